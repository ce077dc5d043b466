"""The engine end to end with a tiny network: sources, names, records, warnings, protocols."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tessellar.data.batch import Batch
from tessellar.data.dataset import ImageDataset
from tessellar.errors import UserError
from tessellar.evaluation.collect import Needs, collect, rebatch
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.networks.extractors import Extractor, Features
from tessellar.evaluation.protocols import PROTOCOLS, protocol, small
from tessellar.evaluation.record import differences
from tessellar.evaluation.references import Reference, reference_from
from tessellar.evaluation.sources import (
    ArrayImages,
    DatasetImages,
    FolderImages,
    ImageBatch,
    open_images,
)
from tessellar.evaluation.subset import subset
from tessellar.images import from_uint8

Images = Callable[..., Tensor]
Write = Callable[..., Path]


class Given(ImageDataset):
    """A data set of given uint8 images."""

    class_names = tuple("abcd")

    def __init__(self, images: Tensor) -> None:
        self.images, self.labels = images, torch.arange(len(images)) % 4

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        return {
            "image": from_uint8(self.images[index]),
            "index": index,
            "label": self.labels[index],
        }

    def fingerprint(self) -> str:
        return str(int(self.images.long().sum()))


@pytest.fixture(scope="module")
def reference(tiny: Extractor, random_images: Images) -> Reference:
    return reference_from(DatasetImages(Given(random_images(130, seed=9)), "given", "train"), tiny)


def test_folder_npz_and_data_set_of_equal_images_give_one_record(
    tiny: Extractor,
    reference: Reference,
    random_images: Images,
    write_pngs: Write,
    write_npz: Write,
    tmp_path: Path,
) -> None:
    images = random_images(40)
    sources = [
        FolderImages(write_pngs(images, tmp_path / "same")),
        ArrayImages(write_npz(images, tmp_path / "same.npz")),
        DatasetImages(Given(images), "same"),
    ]
    records = [
        evaluate_samples(s, tiny, reference, metrics=["fd", "is", "kid", "pr"], batch_size=16)
        for s in sources
    ]
    assert records[0]["metrics"] == records[1]["metrics"] == records[2]["metrics"]
    assert len({record["samples"]["hash"] for record in records}) == 1
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert differences(records[0], records[2]) == ["labels: unknown / data"]


def test_names_carry_the_network(
    tiny: Extractor, reference: Reference, random_images: Images
) -> None:
    source = DatasetImages(Given(random_images(20)), "given")
    record = evaluate_samples(
        source, tiny, reference, metrics=["fd", "is", "kid", "pr", "accuracy"]
    )
    names = [
        "FD(tiny)",
        "IS(tiny)",
        "IS(tiny) std",
        "KD(tiny)",
        "KD(tiny) std",
        "precision(tiny)",
        "recall(tiny)",
    ]
    assert list(record["metrics"]) == [*names, "accuracy"]
    assert record["reference"] == {
        "name": "given train",
        "hash": reference.hash,
        "images": 130,
        "split": "train",
    }


def test_accuracy_counts_the_networks_hits(tiny: Extractor, random_images: Images) -> None:
    images = random_images(30)
    data = Given(images)
    data.labels = tiny(images).logits.argmax(dim=1)
    data.labels[:6] = (data.labels[:6] + 1) % 4
    record = evaluate_samples(DatasetImages(data, "given"), tiny, None, metrics=["accuracy"])
    assert record["metrics"] == {"accuracy": 24 / 30}


def test_the_last_batch_is_filled_up_so_that_the_network_sees_one_shape(
    tiny: Extractor, random_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    extract = type(tiny).extract

    def watched(self: Extractor, images: Tensor) -> Features:
        shapes.add(tuple(images.shape))
        return extract(self, images)

    monkeypatch.setattr(type(tiny), "extract", watched)
    reference_from(DatasetImages(Given(random_images(21)), "given"), tiny, batch_size=8)
    assert shapes == {(8, 3, 32, 32)}


def test_rebatching_keeps_every_image_in_order() -> None:
    batches = [
        ImageBatch(torch.full((n, 3, 1, 1), n), torch.arange(n) + 10 * n) for n in (5, 1, 0, 9, 4)
    ]
    cut = list(rebatch(batches, 4))
    assert [len(b.images) for b in cut] == [4, 4, 4, 4, 3]
    assert (
        torch.cat([b.index for b in cut]).tolist() == torch.cat([b.index for b in batches]).tolist()
    )


@pytest.mark.parametrize("labels", [torch.arange(400) % 4, torch.arange(400) // 100])
def test_a_part_of_a_data_set_is_spread_over_its_classes(
    labels: Tensor, random_images: Images
) -> None:
    """Whether labels go round or come in blocks."""
    data = Given(random_images(400, size=2))
    data.labels = labels
    part = torch.cat(
        [
            b.labels
            for b in DatasetImages(data, "given", limit=100).batches(33)
            if b.labels is not None
        ]
    )
    assert len(part) == 100 and int(part.bincount().min()) >= 15


def test_features_are_kept_of_a_part_of_the_images(tiny: Extractor, random_images: Images) -> None:
    images = random_images(30)
    kept = collect([ImageBatch(images, torch.arange(30))], 30, tiny, Needs(keep=7), 8).features
    assert kept is not None
    torch.testing.assert_close(kept, tiny(images).features[subset(30, 7)])


def test_too_large_a_part_is_refused(random_images: Images) -> None:
    data = Given(random_images(40))
    with pytest.raises(UserError, match="41 images were asked of given, which has 40"):
        DatasetImages(data, "given", limit=41)


def test_bit_identical_samples_are_reported(
    tiny: Extractor, reference: Reference, random_images: Images
) -> None:
    images = random_images(12)
    images[7] = images[3]
    record = evaluate_samples(DatasetImages(Given(images), "given"), tiny, reference)
    assert any("1 of 12 samples are bit-identical" in w for w in record["warnings"])
    assert any("12 samples are no more than the 96 features" in w for w in record["warnings"])


def test_jpeg_samples_are_refused_and_a_jpeg_reference_warned_of(
    tiny: Extractor, random_images: Images, tmp_path: Path
) -> None:
    for i, image in enumerate(random_images(3).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    with pytest.raises(UserError, match="0.jpg is compressed with loss"):
        open_images(tmp_path)
    reference = reference_from(FolderImages(tmp_path, as_samples=False), tiny)
    record = evaluate_samples(DatasetImages(Given(random_images(5)), "given"), tiny, reference)
    assert any("3 images of the reference" in w and "JPEG" in w for w in record["warnings"])


def test_lossless_webp_of_others_is_measured_and_sizes_are_checked_first(
    random_images: Images, tmp_path: Path
) -> None:
    pictures = random_images(3).permute(0, 2, 3, 1).numpy()
    for kind, lossless in (("kept", True), ("lossy", False)):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(pictures):
            Image.fromarray(image).save(tmp_path / kind / f"{i}.webp", lossless=lossless)
    source = open_images(tmp_path / "kept")
    seen = torch.cat([batch.images for batch in source.batches(2)])
    assert torch.equal(seen, random_images(3)) and not source.warnings
    with pytest.raises(UserError, match="0.webp is compressed with loss"):
        open_images(tmp_path / "lossy")
    Image.new("RGB", (40, 32)).save(tmp_path / "kept" / "9.png")
    with pytest.raises(UserError, match="0.webp is 32x32, 9.png is 40x32.*--size N"):
        open_images(tmp_path / "kept")
    assert open_images(tmp_path / "kept", size=32).count == 4


def test_labels_of_folders_arrays_and_sample_py(
    random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    """Folders are numbered as in training; `sample.py` writes the class into the name and a grid beside."""
    images = random_images(8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        for file in (
            tmp_path / "classes" / ("10" if i % 2 else "2") / f"{i}.png",
            tmp_path / f"s/{i:06}_{i % 4:04}.png",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    Image.new("RGB", (99, 99)).save(tmp_path / "s" / "grid.png")
    (tmp_path / "s" / "samples.json").write_text(
        '{"sampling": {"guidance": 2.0}, "seed": 5, "processes": 8}'
    )
    classes, sampled = FolderImages(tmp_path / "classes"), FolderImages(tmp_path / "s")
    array = ArrayImages(
        write_npz(images, tmp_path / "a.npz", torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]))
    )
    assert classes.labels is not None and classes.labels.tolist() == [0] * 4 + [1] * 4
    assert classes.class_names == ("2", "10") and sampled.class_names == array.class_names == ()
    assert (
        sampled.count == 8
        and sampled.labels is not None
        and sampled.labels.tolist() == [0, 1, 2, 3] * 2
    )
    assert sampled.describe()["sampling"] == {"guidance": 2.0} and sampled.describe()["seed"] == 5
    assert [s.label_plan for s in (classes, sampled, array)] == ["balanced", "balanced", "uneven"]


def test_an_older_record_of_samples_is_read_and_answered_by_the_new_spelling(
    random_images: Images, tmp_path: Path
) -> None:
    for i, image in enumerate(random_images(2).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i:06}_{i:04}.png")
    older = {
        "guidance_scale": 2.0,
        "guidance_schedule": "power_cosine",
        "power": 2.5,
        "temperature": 0.9,
    }
    older |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "algorithm": "sjd", "algorithm_window": 8}
    (tmp_path / "samples.json").write_text(json.dumps({"sampling": older, "seed": 5}))
    source = FolderImages(tmp_path)
    now = source.describe()["sampling"]
    assert now["guidance"] == {
        "class_path": "PowerCosine",
        "init_args": {"scale": 2.0, "power": 2.5},
    }
    assert now["algorithm"] == {"class_path": "SpeculativeJacobi", "init_args": {"window": 8}}
    assert now["choice"]["temperature"] == 0.9
    (warning,) = source.warnings
    assert (
        "it is now sampling: {guidance: {class_path: PowerCosine" in warning and "\n" not in warning
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "needed is uint8"),
        (np.zeros((2, 8, 8), np.uint8), "needed is uint8"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "C order"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(UserError, match=message):
        ArrayImages(tmp_path / "a.npz")


def test_damaged_files_are_refused(random_images: Images, write_npz: Write, tmp_path: Path) -> None:
    path = write_npz(random_images(30), tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:5000])
    for make in (lambda: open_images(path), lambda: open_images(tmp_path / "a.txt")):
        with pytest.raises(UserError):
            make()


def test_images_of_another_size_are_refused(
    tiny: Extractor, reference: Reference, random_images: Images
) -> None:
    with pytest.raises(UserError, match=r"images are \(40, 40\), tiny reads \(32, 32\)"):
        evaluate_samples(DatasetImages(Given(random_images(5, size=40)), "given"), tiny, reference)


def test_a_protocol_is_kept_or_refused(
    tiny: Extractor, reference: Reference, random_images: Images
) -> None:
    source = DatasetImages(Given(random_images(20)), "given")
    own = small("own", 20, "tiny", ("fd", "is"))
    with pytest.raises(UserError, match="needs labels: balanced; given is data"):
        evaluate_samples(source, tiny, reference, own)
    source.label_plan = "balanced"
    assert set(evaluate_samples(source, tiny, reference, own)["metrics"]) == {
        "FD(tiny)",
        "IS(tiny)",
        "IS(tiny) std",
    }
    for changed, message in (
        ({"samples": 50}, "samples: 50; given is 20"),
        ({"reference": "val"}, "reference: val"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_samples(source, tiny, reference, replace(own, **changed))
    with pytest.raises(UserError, match="network: inception; given is tiny"):
        evaluate_samples(source, tiny, reference, replace(PROTOCOLS["adm-50k"], samples=20))
    with pytest.raises(UserError, match="there are adm-50k"):
        protocol("adm")


def test_what_files_cannot_tell_is_a_warning(
    tiny: Extractor, reference: Reference, random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    source = ArrayImages(write_npz(random_images(20), tmp_path / "s.npz"))
    record = evaluate_samples(
        source, tiny, replace(reference, split=None), small("own", 20, "tiny")
    )
    assert [w.split(";")[0] for w in record["warnings"][:2]] == [
        "protocol own needs labels: balanced",
        "protocol own needs reference: train",
    ]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("sfd", "only the Inception network"),
        ("paired", "no reconstructions"),
        ("fd", "give --reference"),
    ],
)
def test_metrics_without_what_they_need_are_refused(
    metric: str, message: str, tiny: Extractor, random_images: Images
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_samples(
            DatasetImages(Given(random_images(9)), "given"), tiny, None, metrics=[metric]
        )  # type: ignore
