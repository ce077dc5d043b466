"""A Hugging Face data set (the optional package `datasets`) by index: from the hub, or a folder of
`save_to_disk`.

Images are taken as they are stored and decoded here, so that rotation, palettes, 16 bits and damage
are treated as in every other reader.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tessellar.data.captions import read_captions
from tessellar.data.classes import order_classes
from tessellar.data.datamodule import PictureDataModule
from tessellar.data.dataset import digest, hold_out
from tessellar.data.framing import Framing
from tessellar.data.image_file import UnreadableImage, decode_image, read_image, read_shape
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.data.tars.members import MAX_CLASSES
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges

CHUNK = 4096  # rows whose captions are looked at together


def load_table(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """The rows of one split as a `datasets.Dataset`; raises UserError where the package or the
    split is missing.
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "reading Hugging Face data sets needs their package: pip install datasets"
        ) from error
    try:
        saved = (Path(path) / "state.json", Path(path) / "dataset_dict.json")
        if any(map(Path.is_file, saved)):
            found = datasets.load_from_disk(path)
            table = found[split] if isinstance(found, dict) else found
        else:
            table = datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:
        # The package raises whatever its file readers and its connection raise.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {path}, split {split!r}: {reason}") from error
    return table


class Rows(NamedTuple):
    """The rows of a table, with images as they are stored, their classes, and which have a caption
    (bool [N]).
    """

    table: Any
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    captioned: Tensor | None = None

    def take(self, places: Sequence[int]) -> "Rows":
        """Some of the rows."""
        rows = list(places)
        captioned = None if self.captioned is None else self.captioned[rows]
        return Rows(
            self.table.select(places), self.labels[rows], self.class_names, self.name, captioned
        )


def classes_of(table: Any, column: str | None, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Classes int64 [N] and their names: of whole numbers, of names, or one class `name` where
    there is no column.
    """
    if column is None:
        return torch.zeros(len(table), dtype=torch.int64), (name,)
    values = list(table.select_columns([column])[:][column])
    if set(map(type, values)) == {str}:
        names = order_classes(values, name)
        places = {value: place for place, value in enumerate(names)}
        return torch.tensor([places[value] for value in values]), names
    for row, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(
                f"{name}[{row}] has class {value!r}; column {column!r} must hold whole numbers or names"
            )
    names = tuple(getattr(table.features[column], "names", None) or ())
    if not names:
        # One wrong number must not become a billion classes.
        if max(values) >= MAX_CLASSES:
            raise UserError(f"{name} has class {max(values)}; it must be below {MAX_CLASSES}")
        names = tuple(map(str, range(max(values) + 1)))
    if min(values) < 0 or max(values) >= len(names):
        row = next(row for row, value in enumerate(values) if not 0 <= value < len(names))
        raise UserError(f"{name}[{row}] has class {values[row]}; there are {len(names)} classes")
    return torch.tensor(values), names


def captioned_of(table: Any, column: str, name: str) -> Tensor:
    """Which rows have a caption, bool [N]; raises UserError where the column holds none, or what is
    no text.
    """
    texts = table.select_columns([column])
    found: list[bool] = []
    for start in range(0, len(table), CHUNK):
        for value in texts[start : start + CHUNK][column]:
            there = read_captions(value, f"{name}[{len(found)}]")
            found.append(bool(there))
    if not any(found):
        raise UserError(f"column {column!r} of {name} holds no text; it should hold captions")
    return torch.tensor(found)


def read_rows(table: Any, image: str, label: str | None, caption: str | None, name: str) -> Rows:
    """The rows of a `datasets.Dataset`.

    Raises UserError for a column that is not there, for what is no class, and for captions that are
    no text.
    """
    import datasets  # type: ignore[import-not-found]

    for column in filter(None, (image, label, caption)):
        if column not in table.column_names:
            raise UserError(
                f"{name} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
    labels, class_names = classes_of(table, label, name)
    captioned = None if caption is None else captioned_of(table, caption, name)
    return Rows(
        table.cast_column(image, datasets.Image(decode=False)), labels, class_names, name, captioned
    )


class HFImages(PictureDataset):
    """Images in the column `image`; captions (a text, or a list of texts) in the column `caption`."""

    def __init__(
        self,
        rows: Rows,
        framing: Framing,
        image: str = "image",
        caption: str | None = None,
        seed: int = 0,
        max_corrupt: float = MAX_CORRUPT,
        vary_captions: bool = False,
    ) -> None:
        self.name = rows.name
        self.table = rows.table
        self.image_column = image
        self.caption_column = caption
        self._text_table: Any = None if caption is None else rows.table.select_columns([caption])
        captioned = None if caption is None else rows.captioned
        super().__init__(
            rows.labels,
            rows.class_names,
            framing=framing,
            seed=seed,
            max_corrupt=max_corrupt,
            captioned=captioned,
            vary_captions=vary_captions,
        )

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def open(self, index: int) -> Image.Image:
        content = self.table[index][self.image_column]
        if isinstance(content, dict) and content.get("bytes") is not None:
            return decode_image(content["bytes"], self.where(index))
        if isinstance(content, dict) and content.get("path"):
            return read_image(content["path"])
        raise UnreadableImage(f"{self.where(index)} holds no image")

    def shape(self, index: int) -> tuple[int, int]:
        content = self.table[index][self.image_column]
        if isinstance(content, dict) and content.get("bytes") is not None:
            return read_shape(content["bytes"], self.where(index))
        return super().shape(index)

    def own_texts(self, index: int) -> tuple[str, ...]:
        if self._text_table is None:
            return ()
        return read_captions(self._text_table[index][self.caption_column], self.where(index))

    def fingerprint(self) -> str:
        """Built on the package's own, which follows content and history of the table."""
        content = self.table._fingerprint
        labels = self.labels.tolist()
        size = self.framing.size
        views = self.framing.describe()
        return digest(set="hf", content=content, labels=labels, size=size, views=views)


@in_ranges
class HFData(PictureDataModule):
    """A Hugging Face data set: `path` is its name on the hub, or a folder; needs the package
    `datasets`.

    `image`, `label` and `caption` name columns; without `label` there is one class. Without
    `val_split`, the share `val_share` of the rows is held out, and never trained on. `options` are
    those of PictureDataModule.
    """

    def __init__(
        self,
        path: str,
        size: int | tuple[int, int],
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_share: float = 0.05,
        revision: str | None = None,
        image: str = "image",
        label: str | None = "label",
        caption: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        self.path = path
        self.config = config
        self.revision = revision
        self.split = split
        self.val_split = val_split
        self.val_share = val_share
        self.image = image
        self.label = label
        self.caption = caption
        self.name = self.name or Path(path).name

    @property
    def holds_out(self) -> bool:
        return self.val_split is None

    @cached_property
    def _parts(self) -> tuple[Rows, Rows]:
        """Training and validation rows."""
        rows = self._rows(self.split)
        if self.val_split is None:
            names = list(map(str, range(len(rows.labels))))
            train, val = hold_out(names, self.val_share, rows.labels.tolist())
            return rows.take(train), rows.take(val)
        val = self._rows(self.val_split)
        if val.class_names != rows.class_names:
            raise UserError(
                f"splits {self.split!r} and {self.val_split!r} of {self.name} have different classes"
            )
        return rows, val

    def _rows(self, split: str) -> Rows:
        table = load_table(self.path, self.config, split, self.revision)
        return read_rows(table, self.image, self.label, self.caption, f"{self.name} {split}")

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._parts[0].class_names

    def train_dataset(self, augment: bool = True) -> HFImages:
        framing = self.framing if augment else self.framing.still()
        return self._images(self._parts[0], framing, vary_captions=augment)

    def val_dataset(self) -> HFImages:
        return self._images(self._parts[1], self.framing.still())

    def _images(self, rows: Rows, framing: Framing, vary_captions: bool = False) -> HFImages:
        return HFImages(
            rows,
            framing,
            image=self.image,
            caption=self.caption,
            seed=self.seed,
            max_corrupt=self.max_corrupt,
            vary_captions=vary_captions,
        )
