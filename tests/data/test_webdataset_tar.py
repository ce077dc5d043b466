import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.data.framing import Framing
from tessellar.data.tars.webdataset_tar import (
    WebDatasetData,
    WebDatasetTars,
    name_classes,
    read_shards,
)
from tessellar.errors import UserError
from tessellar.images import to_uint8


def dataset(spec, framing: Framing = Framing(12), **options) -> WebDatasetTars:  # noqa: B008
    samples = read_shards(spec)
    return WebDatasetTars(samples, name_classes(samples, "pictures", None), framing, **options)


def test_samples_are_numbered_through_the_shards(shards: Path):
    data = dataset(str(shards / "train-{0000,0001}.tar"))
    assert len(data) == 30 and data.class_names == ("cat", "dog", "owl")
    batch = data.batch([29, 0, 19, 20])
    assert (
        to_uint8(batch["image"])[:, 0, 0, 0].tolist() == [29, 0, 19, 20] == batch["index"].tolist()
    )
    assert batch["label"].tolist() == [2, 0, 1, 2] and batch["caption"][0] == "picture 29"
    assert data.where(20) == f"{shards / 'train-0001.tar'}:000020"


def test_captions_and_classes_from_members_of_their_own_go_first(
    tmp_path: Path, make_tar, make_png
):
    members = {
        "x.png": make_png(0),
        "x.json": b'{"caption": "no", "class": 0}',
        "x.txt": b" yes\n",
        "x.cls": b"1",
    }
    data = dataset(
        str(make_tar(tmp_path / "t.tar", members | {"y.png": make_png(1), "y.cls": b"0"}))
    )
    assert [data.caption(i) for i in range(2)] == ["yes", ""] and data.labels.tolist() == [1, 0]


def test_arrays_are_read_without_pickles(tmp_path: Path, make_tar, make_png):
    np.save(tmp_path / "a.npy", np.arange(4.0))
    np.save(tmp_path / "b.npy", np.array([print], dtype=object))
    arrays = {name: (tmp_path / f"{name}.npy").read_bytes() for name in ("a", "b")}
    members = {
        "a.png": make_png(5),
        "a.npy": arrays["a"],
        "b.png": make_png(6),
        "b.npy": arrays["b"],
    }
    data = dataset(str(make_tar(tmp_path / "t.tar", members)))
    read = data.members(0)
    assert read["npy"].tolist() == [0, 1, 2, 3] and np.asarray(read["png"]).max() == 5
    with pytest.raises(UserError, match="b.npy is not npy"):
        data.members(1)


def test_flips_and_crops_are_those_of_folders(tmp_path: Path, make_tar, image_root: Path):
    from tessellar.data.sets.image_folder import ImageFolder

    folder = ImageFolder(image_root, 16, "random", True, seed=3)
    members = {f"{i}.png": (image_root / file).read_bytes() for i, file in enumerate(folder.files)}
    data = dataset(str(make_tar(tmp_path / "t.tar", members)), Framing(16, "random", True), seed=3)
    for each in (folder, data):
        each.set_epoch(2)
    assert torch.equal(folder.batch(range(12))["image"], data.batch(range(12))["image"])


def test_a_corrupt_image_gives_place_to_the_next(tmp_path: Path, make_tar, make_samples):
    members = make_samples(0, 6)
    members["000002.png"] = members["000002.png"][:50]
    data = dataset(str(make_tar(tmp_path / "t.tar", members)))
    batch = data.batch(range(6))
    assert to_uint8(batch["image"])[:, 0, 0, 0].tolist() == [0, 1, 3, 3, 4, 5] and data.corrupt == [
        2
    ]
    assert batch["label"].tolist() == [0, 1, 0, 0, 1, 2] and batch["caption"][2] == "picture 3"
    with pytest.raises(UserError, match="t.tar:000002.png"):
        dataset(str(tmp_path / "t.tar"), max_corrupt=0).batch([2])


def test_a_tar_that_lost_its_end_after_indexing_is_noticed(shards: Path):
    data = dataset(str(shards / "val.tar"), max_corrupt=0)
    path = shards / "val.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="val.tar:000035"):
        data.batch(range(5, 6))
    path.unlink()
    with pytest.raises(UserError, match="val.tar:000030"):
        data.batch([0])


def test_too_many_samples_left_out_are_an_error_and_few_a_warning(
    tmp_path: Path, make_tar, make_samples, caplog: pytest.LogCaptureFixture
):
    path = str(
        make_tar(
            tmp_path / "t.tar",
            {**make_samples(0, 8), "bad.png": b"", "bad.txt": b"\xff", "x.txt": b""},
        )
    )
    with pytest.raises(
        UserError, match="2 of 10 samples .* max_corrupt 0.1 .*bad.txt is not UTF-8"
    ):
        read_shards(path, max_corrupt=0.1)
    with caplog.at_level(logging.WARNING):
        assert len(read_shards(path, max_corrupt=0.2)) == 8
    assert "2 of 10 samples are left out" in caplog.text and "bad.txt is not UTF-8" in caplog.text


def test_classes_are_named_counted_and_bounded(tmp_path: Path, make_tar, make_png):
    def samples(*labels: bytes | None):
        members = {}
        for i, label in enumerate(labels):
            members |= {f"{i}.png": make_png(i)} | ({} if label is None else {f"{i}.cls": label})
        return read_shards(str(make_tar(tmp_path / "t.tar", members)))

    assert name_classes(samples(b"2", b"0"), "x", None) == ("0", "1", "2")
    assert name_classes(samples(b"2", b"0"), "x", 5) == ("0", "1", "2", "3", "4")
    assert name_classes(samples(None, None), "x", None) == ("x",)
    with pytest.raises(UserError, match="t.tar:0 has class 7; it must be below 5"):
        name_classes(samples(b"7", b"0"), "x", 5)
    with pytest.raises(UserError, match="t.tar:1 has no class"):
        name_classes(samples(b"1", None), "x", None)


def test_validation_classes_must_be_those_of_training(shards: Path, make_tar, make_png):
    val = make_tar(shards / "other.tar", {"x.png": make_png(0), "x.cls": b"3"})
    data = WebDatasetData(str(shards / "train-*.tar"), 12, val_shards=str(val))
    with pytest.raises(UserError, match="other.tar:x has class 3; there are 3 classes"):
        data.val_dataset()


def test_shards_are_named_by_globs_braces_folders_and_lists(shards: Path):
    for spec, count in (
        (f"{shards}/train-*.tar", 30),
        (f"{shards}/train-{{0000..0001}}.tar", 30),
        (str(shards), 36),
        ([f"{shards}/val.tar", f"{shards}/train-0001.tar"], 16),
    ):
        assert len(read_shards(spec)) == count
    for spec, why in (
        (f"{shards}/no-*.tar", "no-.*there is no such tar"),
        (f"{shards}/train-{{0000..0002}}.tar", "train-0002.tar: there is no such tar"),
        ([f"{shards}/val.tar", str(shards)], "val.tar is named twice"),
        (f"{shards}/{{a", "no such tar|braces do not match"),
    ):
        with pytest.raises(UserError, match=why):
            read_shards(spec)


def test_a_held_out_share_is_complete_and_disjoint(shards: Path):
    data = WebDatasetData(str(shards / "train-*.tar"), 12, val_share=0.2, flip=False)
    shown = [
        to_uint8(d.batch(range(len(d)))["image"])[:, 0, 0, 0].tolist()
        for d in (data.train_dataset(), data.val_dataset())
    ]
    assert len(shown[1]) == 6 and sorted(shown[0] + shown[1]) == list(range(30))
    again = WebDatasetData(str(shards / "train-*.tar"), 12, val_share=0.2)
    assert again.val_dataset().fingerprint() == data.val_dataset().fingerprint()


def test_a_decompression_bomb_in_a_tar_is_refused_by_name(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(UserError, match="000030.png: .*decompression bomb"):
        dataset(str(shards / "val.tar"), max_corrupt=0).batch([0])


def test_an_empty_set_is_refused(tmp_path: Path, make_tar):
    with pytest.raises(UserError, match="holds no image"):
        read_shards(str(make_tar(tmp_path / "t.tar", {"README": b""})))
