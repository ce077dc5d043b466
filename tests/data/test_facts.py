"""What a data module says of itself to checkpoints: names of classes, and hashes of both parts' content."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessellar.checkpoints.data_facts import DataFacts, other_class, other_content
from tessellar.data import (
    CachedTokensData,
    FashionMNISTData,
    HFData,
    ImageDataModule,
    ImageFolderData,
    ShapesData,
    WebDatasetData,
    WebDatasetStreamData,
)
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

Make = Callable[[], ImageDataModule]


def changed(make: Make, change: Callable[[], object]) -> str | None:
    """Which parts are others after `change`; classes keep their names."""
    before = make().facts()
    assert make().facts() == before and other_content(before, make().facts()) is None
    change()
    after = make().facts()
    assert other_class(before.class_names, after.class_names) is None
    return other_content(before, after)


def test_shapes() -> None:
    facts = ShapesData(16, 20, 10).facts()
    assert facts == ShapesData(16, 20, 10).facts() and len(facts.class_names) == 10
    assert other_content(facts, ShapesData(16, 20, 11).facts()) == "validation data"
    assert (
        other_content(facts, ShapesData(16, 20, 10, seed=1).facts())
        == "training and validation data"
    )


def test_folders(image_root: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    for name in ("cat", "dog", "red_fox"):
        (val / name).mkdir(parents=True)
        (val / name / "a.png").write_bytes((image_root / "cat" / "01.png").read_bytes())

    def make() -> ImageDataModule:
        return ImageFolderData(str(image_root), 16, val_root=str(val))

    assert make().facts().class_names == ("cat", "dog", "red_fox")
    assert changed(make, lambda: (val / "dog" / "b.png").write_bytes(b"more")) == "validation data"
    assert changed(
        make, lambda: (image_root / "cat" / "01.png").rename(image_root / "dog" / "01.png")
    ) == ("training data")


def test_a_link_to_nowhere_is_left_to_the_reader(image_root: Path) -> None:
    (image_root / "cat" / "gone.png").symlink_to("nowhere.png")
    assert len(ImageFolderData(str(image_root), 16, val_share=0.2).facts().train) == 16


def test_a_flat_folder_may_move(image_root: Path, tmp_path: Path) -> None:
    """Its only class is called as the folder is."""
    here = ImageFolderData(str(image_root / "cat"), 16, val_share=0.4).facts()
    (image_root / "cat").rename(tmp_path / "cats")
    there = ImageFolderData(str(tmp_path / "cats"), 16, val_share=0.4).facts()
    assert here.class_names != there.class_names
    assert (
        other_class(here.class_names, there.class_names) is None
        and other_content(here, there) is None
    )


def test_idx_files(idx_root: Path) -> None:
    def swap_labels() -> None:
        path = idx_root / "t10k-labels-idx1-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:8] + content[8:][::-1])

    assert changed(lambda: FashionMNISTData(str(idx_root)), swap_labels) == "validation data"


def test_tars_and_their_captions(shards: Path, make_tar, make_samples) -> None:
    def make() -> ImageDataModule:
        return WebDatasetData(str(shards / "train-*.tar"), 12, val_shards=str(shards / "val.tar"))

    assert make().facts().class_names == ("cat", "dog", "owl")
    assert (
        changed(make, lambda: make_tar(shards / "val.tar", make_samples(31, 6)))
        == "validation data"
    )
    told = {
        name: content.replace(b"picture", b"a photo of")
        for name, content in make_samples(20, 10).items()
    }
    assert changed(make, lambda: make_tar(shards / "train-0001.tar", told)) == "training data"


def test_validation_tars_that_name_classes_otherwise_are_refused(
    shards: Path, make_tar, make_samples
) -> None:
    renamed = {
        name: content.replace(b'"owl"', b'"emu"') for name, content in make_samples(30, 6).items()
    }
    make_tar(shards / "val.tar", renamed)
    data = WebDatasetData(str(shards / "train-*.tar"), 12, val_shards=str(shards / "val.tar"))
    with pytest.raises(UserError, match=r"val.tar: class 2 is 'emu' here, 'owl' in .*train"):
        data.check_files()


def test_streams_are_known_by_their_shards() -> None:
    def facts(shards: str, classes: int = 3) -> DataFacts:
        return WebDatasetStreamData(
            shards, "http://host/val.tar", 12, 100, num_classes=classes
        ).facts()

    here = facts("http://host/{0..3}.tar")
    assert other_content(here, facts("http://host/{0..4}.tar")) == "training data"
    more = facts("http://host/{0..3}.tar", classes=4)
    assert (
        other_class(here.class_names, more.class_names)
        == "class 3 is new: '3' (3 classes then, 4 now)"
    )


def test_hugging_face_sets(make_png, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a stand-in for a table, so that the package is not needed."""
    from tessellar.data.sets import hf_dataset
    from tessellar.data.sets.hf_dataset import Rows

    content = {"train": ("a", ("cat", "dog")), "val": ("b", ("cat", "dog"))}

    class Table:
        def __init__(self, fingerprint: str) -> None:
            self._fingerprint = fingerprint

    def rows(self: HFData, split: str) -> Rows:
        fingerprint, names = content[split]
        return Rows(Table(fingerprint), torch.tensor([0, 1]), names, split)

    monkeypatch.setattr(hf_dataset.HFData, "_rows", rows)

    def make() -> ImageDataModule:
        return HFData("set", 12, val_split="val")

    assert changed(make, lambda: content.update(train=("c", ("cat", "dog")))) == "training data"
    before = make().facts()
    content.update(train=("c", ("dog", "cat")), val=("b", ("dog", "cat")))
    assert (
        other_class(before.class_names, make().facts().class_names)
        == "class 0 was 'cat' and is now 'dog'"
    )


def test_token_caches(tmp_path: Path) -> None:
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 8, 16, 1, 1, 2)

    def encode(part: str, seed: int) -> None:
        data = ShapesData(16, 8, 4, seed=seed)
        dataset = data.train_dataset() if part == "train" else data.val_dataset()
        encode_dataset(tokenizer, dataset, tmp_path / part, name="shapes", overwrite=True)

    encode("train", 0)
    encode("val", 0)

    def make() -> ImageDataModule:
        return CachedTokensData(str(tmp_path))

    assert make().facts().class_names == ShapesData.class_names
    assert changed(make, lambda: encode("val", 1)) == "validation data"

    def other_names() -> None:
        path = tmp_path / "val" / "header.json"
        path.write_text(path.read_text().replace('"circle"', '"disc"'))

    other_names()
    with pytest.raises(
        UserError, match="have different classes: class 0 was 'circle' and is now 'disc'"
    ):
        make().check_files()


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (("a", "b"), ("a", "b"), None),
        (("a",), ("b",), None),
        (("a", "b"), ("b", "a"), "class 0 was 'a' and is now 'b'"),
        (("a", "b"), ("a",), "class 1 was 'b' and is gone (2 classes then, 1 now)"),
        (("a",), ("a", "b"), "class 1 is new: 'b' (1 classes then, 2 now)"),
        (("a", "b", "c"), ("a", "c"), "class 1 was 'b' and is now 'c' (3 classes then, 2 now)"),
    ],
)
def test_the_first_difference_of_classes(
    then: tuple[str, ...], now: tuple[str, ...], expected: str | None
) -> None:
    assert other_class(then, now) == expected
