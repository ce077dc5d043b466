"""The reader is tested on the package `datasets` where it is installed, else on a stand-in with the calls it makes."""

import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tessellar.data.framing import Framing
from tessellar.data.sets.hf_dataset import HFData, HFImages
from tessellar.errors import UserError
from tessellar.images import to_uint8


class Table:
    """Columns of a `datasets.Dataset`; images read as their decoded form unless decoding was switched off."""

    def __init__(
        self, columns: dict[str, list], features: dict[str, Any], stored: bool = False
    ) -> None:
        self.columns, self.features, self.stored = columns, features, stored
        self.column_names = list(columns)
        self._fingerprint = str(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, slice):
            return {name: column[key] for name, column in self.columns.items()}
        row = {name: column[key] for name, column in self.columns.items()}
        return row if self.stored else row | {"image": "decoded"}

    def cast_column(self, name: str, feature: Any) -> "Table":
        assert name == "image" and feature == ("Image", False)
        return Table(self.columns, self.features, stored=True)

    def select(self, places: Sequence[int]) -> "Table":
        return Table(
            {n: [c[i] for i in places] for n, c in self.columns.items()}, self.features, self.stored
        )

    def select_columns(self, names: list[str]) -> "Table":
        return Table({name: self.columns[name] for name in names}, self.features, stored=True)


def stand_in(tables: dict[str, Table]) -> types.ModuleType:
    module = types.ModuleType("datasets")

    def load_from_disk(path: str) -> dict[str, Table]:
        return tables

    def load_dataset(path: str, config: str | None, split: str, revision: str | None) -> Table:
        raise FileNotFoundError(f"Couldn't find any data file at {path}.\nMore lines")

    vars(module).update(
        Image=lambda decode: ("Image", decode),
        load_from_disk=load_from_disk,
        load_dataset=load_dataset,
    )
    return module


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Saves splits, each a dictionary of columns (image: bytes), with names of classes; returns the folder."""
    real = importlib.util.find_spec("datasets") is not None
    folder = tmp_path / "pictures"

    def with_package(names: Sequence[str] = (), **splits: dict[str, list]) -> str:
        import datasets  # type: ignore[import-not-found]

        def table(columns: dict[str, list]):
            made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
            return (
                made.cast_column("label", datasets.ClassLabel(names=list(names))) if names else made
            )

        datasets.DatasetDict(
            {name: table(columns) for name, columns in splits.items()}
        ).save_to_disk(folder)
        return str(folder)

    def without(names: Sequence[str] = (), **splits: dict[str, list]) -> str:
        features: dict[str, Any] = dict.fromkeys(next(iter(splits.values())))
        if names:
            features["label"] = types.SimpleNamespace(names=list(names))
        tables = {name: Table(columns, features) for name, columns in splits.items()}
        monkeypatch.setitem(sys.modules, "datasets", stand_in(tables))
        folder.mkdir()
        (folder / "dataset_dict.json").write_text("{}")
        return str(folder)

    return with_package if real else without


def rows(make_png, first: int, count: int, **columns) -> dict[str, list]:
    return {
        "image": [{"bytes": make_png(i), "path": None} for i in range(first, first + count)]
    } | columns


def shown(data: HFImages) -> list[int]:
    return to_uint8(data.batch(range(len(data)))["image"])[:, 0, 0, 0].tolist()


def test_images_labels_and_captions_are_those_of_the_columns(save, make_png):
    path = save(
        names=["cat", "red_fox"],
        train=rows(make_png, 0, 4, label=[0, 1, 1, 0], text=["one", "two", "three", None]),
        test=rows(make_png, 9, 2, label=[1, 1], text=["x", "y"]),
    )
    data = HFData(path, 12, val_split="test", caption="text", flip=False)
    batch = data.train_dataset().batch([3, 1, 2])
    assert to_uint8(batch["image"])[:, 0, 0, 0].tolist() == [3, 1, 2] == batch["index"].tolist()
    assert batch["label"].tolist() == [0, 1, 1] and batch["caption"] == ["cat", "two", "three"]
    assert data.train_dataset().captions(range(3)) == ["one", "two", "three"]
    assert data.class_names == ("cat", "red_fox") and data.name == "pictures"
    assert (
        shown(data.val_dataset()) == [9, 10] and data.val_dataset().where(1) == "pictures test[1]"
    )


def test_without_a_column_of_classes_there_is_one(save, make_png):
    data = HFData(save(train=rows(make_png, 0, 10)), 12, label=None, val_share=0.2)
    train, val = shown(data.train_dataset(augment=False)), shown(data.val_dataset())
    assert len(val) == 2 and sorted(train + val) == list(range(10))
    assert data.num_classes == 1 and data.train_dataset()[0]["label"] == 0


def test_classes_may_be_names_or_bare_numbers(save, make_png):
    data = HFData(
        save(train=rows(make_png, 0, 4, kind=["dog", "cat", "dog", "cat"])), 12, label="kind"
    )
    assert data.class_names == ("cat", "dog")
    labels = {
        int(c): int(y)
        for d in (data.train_dataset(False), data.val_dataset())
        for c, y in zip(shown(d), d.labels, strict=True)
    }
    assert labels == {0: 1, 1: 0, 2: 1, 3: 0}


@pytest.mark.parametrize(
    "labels, why",
    [
        ([0, -2], r"train\[1\] has class -2; there are 1"),
        ([0, 10**9], "below"),
        ([0, None], "class None"),
    ],
)
def test_what_is_no_class_is_refused(save, make_png, labels: list, why: str):
    data = HFData(save(train=rows(make_png, 0, 2, label=labels)), 12)
    with pytest.raises(UserError, match=why):
        data.train_dataset()


def test_a_corrupt_image_gives_place_to_the_next(save, make_png):
    columns = rows(make_png, 0, 4, label=[0, 1, 0, 1])
    columns["image"][1] = {"bytes": b"\x89PNG", "path": None}
    table = HFData(save(train=columns), 12)
    data = HFImages(table._rows("train"), Framing(12), max_corrupt=0.3)
    assert shown(data) == [0, 2, 2, 3] and data.corrupt == [1]
    assert data.batch([1])["label"].tolist() == [0]


def test_unknown_columns_splits_and_paths_are_named(save, make_png, tmp_path: Path):
    path = save(train=rows(make_png, 0, 4, label=[0, 1, 0, 1]))
    with pytest.raises(UserError, match="no column 'class'; it has image, label"):
        HFData(path, 12, label="class").train_dataset()
    with pytest.raises(UserError, match="cannot load .*split 'val'"):
        HFData(path, 12, val_split="val").train_dataset()
    with pytest.raises(UserError, match="cannot load .*nowhere, split 'train': .*[^\n]*$"):
        HFData(str(tmp_path / "nowhere"), 12).train_dataset()


def test_classes_of_both_splits_must_agree(save, make_png):
    path = save(
        train=rows(make_png, 0, 2, label=["a", "b"]), test=rows(make_png, 0, 2, label=["a", "c"])
    )
    with pytest.raises(UserError, match="different classes"):
        HFData(path, 12, val_split="test").train_dataset()


def test_of_several_captions_each_visit_draws_one(save, make_png):
    several = ["a cat", "one cat", "the cat"]
    path = save(train=rows(make_png, 0, 8, text=[several] * 8))
    data = HFData(path, 12, label=None, caption="text", val_share=0.25)

    def seen(dataset: HFImages) -> set[str]:
        texts = set()
        for epoch in range(20):
            dataset.set_epoch(epoch)
            texts.add(dataset.caption(0))
        return texts

    assert seen(data.train_dataset()) == set(several) and seen(data.val_dataset()) == {"a cat"}


def test_a_missing_caption_is_the_name_of_its_class_where_that_is_a_text(
    save, make_png, caplog: pytest.LogCaptureFixture
):
    path = save(
        train=rows(make_png, 0, 4, kind=["dog", "red_fox"] * 2, text=["one", None, "three", None])
    )
    data = HFData(path, 12, label="kind", caption="text", val_share=0.25)
    with caplog.at_level(logging.WARNING):
        assert set(data.train_dataset().captions(range(3))) <= {"one", "three", "red fox"}
    assert "have no caption" in caplog.text and "the name of the class is taken" in caplog.text


@pytest.mark.parametrize(
    "texts, why",
    [
        ([5, 6], r"train\[0\]: the caption is 5"),
        ([{"raw": "a"}] * 2, r"train\[0\]: the caption is {'raw': 'a'}"),
        ([b"a", b"b"], r"train\[0\]: the caption is b'a'"),
        ([None, None], "column 'text' of pictures train holds no text"),
        (["", " "], "column 'text' of pictures train holds no text"),
    ],
)
def test_a_named_column_that_holds_no_text_is_refused(save, make_png, texts: list, why: str):
    data = HFData(
        save(train=rows(make_png, 0, 2, text=texts)), 12, label=None, caption="text", val_share=0.5
    )
    with pytest.raises(UserError, match=why):
        data.check_files()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        HFData("somewhere", 12).train_dataset()
