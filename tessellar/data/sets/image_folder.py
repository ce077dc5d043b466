"""ImageFolder: images in one sub-folder a class (in the order of `classes.py`), or all in one
folder, the only class.

Hidden and system files are passed over, files of other kinds named with their count (`files.py`).
Crops, augmentation and corrupt images are `pictures.py`'s.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from PIL import Image
from torch import Tensor

from tessellar.data.classes import order_classes
from tessellar.data.crops import Resize
from tessellar.data.datamodule import PictureDataModule
from tessellar.data.dataset import digest, hold_out
from tessellar.data.files import (
    files_below,
    is_image,
    plain_files,
    sub_folders,
    tell_left_out,
)
from tessellar.data.framing import Crop, Framing
from tessellar.data.image_file import EXTENSIONS, read_image, read_shape
from tessellar.data.names import Names
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges


class Listing(NamedTuple):
    """The images of a folder: paths relative to it, in a fixed order, with their labels int64 [N]."""

    files: Names
    labels: Tensor
    class_names: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> "Listing":
        """The listing of some of its rows."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        return Listing(self.files.take(chosen.numpy()), self.labels[chosen], self.class_names)


def list_folder(root: str | Path) -> Listing:
    """The images below `root`; raises UserError if there are none, or some beside and some inside
    sub-folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; it should hold images, or one sub-folder of images for each class"
        )
    beside = plain_files(root)
    flat = list(filter(is_image, beside))
    classes = order_classes(sub_folders(root), str(root))
    if flat and classes:
        raise UserError(
            f"{root} holds images ({flat[0]}) and folders ({classes[0]}): move the images into class folders"
        )
    if flat:
        tell_left_out(str(root), len(beside), no_images(beside))
        labels = torch.zeros(len(flat), dtype=torch.int64)
        return Listing(Names(flat), labels, (root.resolve().name,))
    if not classes:
        _refuse_empty(root)
    total = len(beside)
    left_out = no_images(beside)
    images: list[str] = []
    counts: list[int] = []
    for name in classes:
        files = files_below(root / name)
        found = list(filter(is_image, files))
        if not found:
            _refuse_empty(root / name)
        total += len(files)
        if len(found) < len(files):
            left_out += tuple(f"{name}/{file}" for file in no_images(files))
        images += [f"{name}/{file}" for file in found]
        counts.append(len(found))
    tell_left_out(str(root), total, left_out)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Listing(Names(images), labels, classes)


def no_images(files: Sequence[str]) -> tuple[str, ...]:
    """Those of some files that are not read."""
    return tuple(file for file in files if not is_image(file))


def _refuse_empty(folder: Path) -> NoReturn:
    """Raise UserError for a folder without images, with the files that it does hold."""
    files = files_below(folder)
    others = f"; it holds {len(files)} other files, such as {files[0]}" if files else ""
    raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)}){others}")


def split_listing(listing: Listing, val_share: float) -> tuple[Listing, Listing]:
    """Training and validation part, the latter the share `val_share` of each class (see `hold_out`)."""
    train, val = hold_out(list(listing.files), val_share, listing.labels.tolist())
    return listing.take(train), listing.take(val)


def _size(file: str) -> int:
    """Bytes of a file, -1 where it is gone: that is for the reader to count as corrupt."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


class ImageFolder(PictureDataset):
    """Images of `root`, framed as Framing says. `listing` restricts the set to some of the files."""

    def __init__(
        self,
        root: str | Path,
        size: int | tuple[int, int],
        crop: Crop = "adm",
        flip: bool = False,
        ten_ratios: Sequence[float] = (1.1,),
        seed: int = 0,
        listing: Listing | None = None,
        max_corrupt: float = MAX_CORRUPT,
        resize: Resize | None = None,
        centring: tuple[int, int] | None = None,
    ) -> None:
        framing = Framing(size, crop, flip, tuple(ten_ratios), resize, centring)
        listing = list_folder(root) if listing is None else listing
        self.root = Path(root)
        self.files = listing.files
        super().__init__(listing.labels, listing.class_names, framing, seed, max_corrupt)

    def where(self, index: int) -> str:
        return str(self.root / self.files[index])

    def open(self, index: int) -> Image.Image:
        return read_image(self.root / self.files[index])

    def shape(self, index: int) -> tuple[int, int]:
        return read_shape(self.root / self.files[index], self.where(index))

    def fingerprint(self) -> str:
        root = f"{self.root}{os.sep}"
        files = [(file, _size(root + file)) for file in self.files]
        labels = self.labels.tolist()
        size = self.framing.size
        views = self.framing.describe()
        return digest(set="image-folder", files=files, labels=labels, size=size, views=views)


@in_ranges
class ImageFolderData(PictureDataModule):
    """Your own images: one sub-folder a class, or one flat folder, whose name the set has.

    Without `val_root`, the share `val_share` of the files is held out for validation: they are
    never trained on, which no published recipe does. Validation and reference statistics take the
    ADM centre crop. `options` are those of PictureDataModule.
    """

    def __init__(
        self,
        root: str,
        size: int | tuple[int, int],
        val_root: str | None = None,
        val_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        self.root = root
        self.val_root = val_root
        self.val_share = val_share
        self.name = self.name or Path(root).resolve().name

    @property
    def holds_out(self) -> bool:
        return self.val_root is None

    @cached_property
    def _listings(self) -> tuple[Listing, Listing]:
        if self.val_root is None:
            return split_listing(list_folder(self.root), self.val_share)
        train = list_folder(self.root)
        val = list_folder(self.val_root)
        if (
            train.class_names != val.class_names
            and max(len(train.class_names), len(val.class_names)) > 1
        ):
            missing = sorted(set(train.class_names) ^ set(val.class_names))
            raise UserError(
                f"{self.root} and {self.val_root} hold different classes, for example {missing[0]!r}"
            )
        return train, val

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._listings[0].class_names

    def train_dataset(self, augment: bool = True) -> ImageFolder:
        framing = self.framing if augment else self.framing.still()
        return self._folder(self.root, self._listings[0], framing)

    def val_dataset(self) -> ImageFolder:
        return self._folder(self.val_root or self.root, self._listings[1], self.framing.still())

    def _folder(self, root: str, listing: Listing, framing: Framing) -> ImageFolder:
        return ImageFolder(
            root,
            framing.size,
            crop=framing.crop,
            flip=framing.flip,
            ten_ratios=framing.ten_ratios,
            seed=self.seed,
            listing=listing,
            max_corrupt=self.max_corrupt,
            resize=framing.resize,
            centring=framing.centring,
        )
