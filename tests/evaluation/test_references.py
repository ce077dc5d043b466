"""Reference statistics: cache, files of ours and of others."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tessellar.data import ImageFolderData
from tessellar.errors import UserError
from tessellar.evaluation import references
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.references import (
    load_reference,
    load_statistics,
    reference_from,
    save_statistics,
)
from tessellar.evaluation.sources import ArrayImages, DatasetImages, FolderImages

Images = Callable[..., Tensor]
Write = Callable[..., Path]


@pytest.fixture
def npz(random_images: Images, write_npz: Write, tmp_path: Path) -> Path:
    return write_npz(random_images(30), tmp_path / "images.npz")


def test_the_cache_saves_the_second_pass(tiny: Extractor, npz: Path, tmp_path: Path) -> None:
    first = reference_from(ArrayImages(npz), tiny, tmp_path / "cache")
    with mock.patch.object(references, "collect_all", side_effect=AssertionError("computed again")):
        second = reference_from(ArrayImages(npz), tiny, tmp_path / "cache")
    assert torch.equal(first.moments.cov, second.moments.cov) and first.hash == second.hash
    assert (
        first.features is not None
        and second.features is not None
        and torch.equal(first.features, second.features)
    )
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"]


def test_changed_images_and_another_network_miss_the_cache(
    tiny: Extractor,
    random_images: Images,
    write_npz: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = reference_from(
        ArrayImages(write_npz(random_images(30), tmp_path / "a.npz")), tiny, tmp_path / "cache"
    )
    changed = write_npz(random_images(31, seed=3), tmp_path / "a.npz")
    assert reference_from(ArrayImages(changed), tiny, tmp_path / "cache").hash != first.hash
    monkeypatch.setattr(tiny, "sha256", "0" * 64)
    reference_from(ArrayImages(changed), tiny, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_hash_is_of_the_pixels_whatever_the_file(
    tiny: Extractor, npz: Path, random_images: Images, write_pngs: Write, tmp_path: Path
) -> None:
    folder = FolderImages(write_pngs(random_images(30), tmp_path / "folder"), as_samples=False)
    assert reference_from(folder, tiny).hash == reference_from(ArrayImages(npz), tiny).hash


def test_saving_and_loading_are_inverse(tiny: Extractor, npz: Path, tmp_path: Path) -> None:
    reference = reference_from(ArrayImages(npz), tiny)
    save_statistics(reference, tmp_path / "deep" / "ref.npz")
    loaded = load_statistics(tmp_path / "deep" / "ref.npz")
    assert (loaded.name, loaded.hash, loaded.extractor) == (
        reference.name,
        reference.hash,
        reference.extractor,
    )
    assert loaded.moments.count == 30 and torch.equal(loaded.moments.mean, reference.moments.mean)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_foreign_statistics_are_read(
    names: tuple[str, str], tiny: Extractor, npz: Path, tmp_path: Path
) -> None:
    moments = reference_from(ArrayImages(npz), tiny).moments
    np.savez(
        tmp_path / "foreign.npz", **{names[0]: moments.mean.numpy(), names[1]: moments.cov.numpy()}
    )  # type: ignore
    reference = load_reference(tmp_path / "foreign.npz", tiny)
    assert reference.moments.count is None and reference.name == "foreign"
    record = evaluate_samples(ArrayImages(npz), tiny, reference)
    assert record["metrics"]["FD(tiny)"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="statistics only; pr needs its images"):
        evaluate_samples(ArrayImages(npz), tiny, reference, metrics=["pr"])


def test_an_adm_reference_batch_gives_statistics_and_images(
    tiny: Extractor, npz: Path, random_images: Images, tmp_path: Path
) -> None:
    """FID takes its mu and sigma, which are of more images than arr_0 holds; precision and recall take arr_0."""
    other = reference_from(ArrayImages(npz), tiny).moments
    images = random_images(12, seed=5)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "mu": other.mean, "sigma": other.cov}
    np.savez(tmp_path / "VIRTUAL.npz", **arrays)
    reference = load_reference(tmp_path / "VIRTUAL.npz", tiny)
    assert torch.equal(reference.moments.cov, other.cov)
    assert reference.features is not None
    torch.testing.assert_close(reference.features, tiny(images).features)


def test_images_serve_as_a_reference(tiny: Extractor, npz: Path, tmp_path: Path) -> None:
    assert load_reference(npz, tiny, tmp_path / "cache").moments.count == 30


def test_statistics_of_another_network_are_refused(
    tiny: Extractor, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_statistics(reference_from(ArrayImages(npz), tiny), tmp_path / "ref.npz")
    monkeypatch.setattr(tiny, "sha256", "0" * 64)
    with pytest.raises(UserError, match="computed with tiny: other sha256"):
        load_reference(tmp_path / "ref.npz", tiny)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="has 3 features, tiny has 96"):
        load_reference(tmp_path / "foreign.npz", tiny)


def test_broken_statistics_are_refused(tiny: Extractor, tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", mu=np.full(96, np.nan), sigma=np.eye(96))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(96), sigma=np.zeros(96))
    np.savez(tmp_path / "half.npz", mu=np.zeros(96))
    for name, message in (
        ("nan", "not finite"),
        ("shape", "covariance"),
        ("half", "no statistics"),
    ):
        with pytest.raises(UserError, match=message):
            load_reference(tmp_path / f"{name}.npz", tiny)


def test_a_failed_write_leaves_no_file(tiny: Extractor, npz: Path, tmp_path: Path) -> None:
    reference = reference_from(ArrayImages(npz), tiny)
    with (
        mock.patch("numpy.savez", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        save_statistics(reference, tmp_path / "cache" / "ref.npz")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_reference_has_a_name_and_a_hash(tiny: Extractor, npz: Path, tmp_path: Path) -> None:
    plain = load_reference(npz, tiny)
    named = load_reference(f"mine={npz}@{plain.hash[:6]}", tiny)
    assert (named.name, named.hash, named.split) == ("mine", plain.hash, None)
    assert load_reference(f"adm-imagenet256={npz}", tiny).split == "train"
    for text in (f"{npz}@0123", f"mine={npz}@0123"):
        with pytest.raises(UserError, match=f"has the hash {plain.hash}, not 0123"):
            load_reference(text, tiny)


def test_records_say_how_pictures_were_cropped(
    tiny: Extractor, random_images: Images, write_pngs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pngs(random_images(12, size=50), tmp_path / "pictures")
    images = FolderImages(folder, size=32)
    crop = "ADM's centre crop to 32 (halved with a box filter, then bicubic)"
    reference = reference_from(images, tiny, tmp_path / "cache")
    again = reference_from(images, tiny, tmp_path / "cache")
    assert images.describe()["crop"] == reference.describe()["crop"] == again.crop == crop
    data = ImageFolderData(str(folder), size=32, val_share=0.5).train_dataset(augment=False)
    assert DatasetImages(data, "pictures", "train").describe()["crop"] == crop
    uncropped = FolderImages(write_pngs(random_images(3), tmp_path / "small"))
    assert "crop" not in uncropped.describe()
