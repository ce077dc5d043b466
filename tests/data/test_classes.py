"""One order of classes for every reader."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from tessellar.data.classes import order_classes
from tessellar.data.sets.hf_dataset import classes_of
from tessellar.data.sets.image_folder import ImageFolder
from tessellar.evaluation.sources import FolderImages


@pytest.mark.parametrize(
    "names, ordered",
    [
        (["10", "9", "2", "2"], ("2", "9", "10")),
        (["007", "-1", "10"], ("-1", "007", "10")),
        (["10", "9", "dog"], ("10", "9", "dog")),
        (["cat_10", "cat_9"], ("cat_10", "cat_9")),
        (["²", "10"], ("10", "²")),
        (["dog", "Cat", "élan"], ("Cat", "dog", "élan")),
    ],
)
def test_whole_numbers_are_ordered_by_value_and_all_else_as_text(
    names: list[str], ordered: tuple[str, ...]
):
    assert order_classes(names, "here") == ordered


def test_that_the_order_is_by_value_is_said_once_where_it_matters(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        order_classes(["1", "2", "10"], "a set of its own")
        order_classes(["1", "2", "3"], "another set")
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        said.startswith("a set of its own: classes are numbered by value")
        and "'1', '10', '2'" in said
    )


class Column(dict):
    """A table of one column, as far as classes are read from it."""

    def select_columns(self, names: list[str]) -> dict[slice, dict[str, list]]:
        return self

    def __getitem__(self, key):
        return self if isinstance(key, slice) else super().__getitem__(key)

    features: dict = {}


def test_readers_and_evaluation_number_the_same_names_alike(tmp_path: Path):
    names = [str(k) for k in range(12)]
    for name in names:
        (tmp_path / "num" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "num" / name / "0.png")
    trained, measured = ImageFolder(tmp_path / "num", 8), FolderImages(tmp_path / "num")
    labels, hf_names = classes_of(Column(kind=sorted(names)), "kind", "hub")
    assert trained.class_names == measured.class_names == hf_names == tuple(names)
    assert (
        measured.labels is not None
        and measured.labels.tolist() == trained.labels.tolist() == list(range(12))
    )
    assert [hf_names[label] for label in labels] == sorted(names)
