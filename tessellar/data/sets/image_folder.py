"""ImageFolder: images in one sub-folder a class (in the order of `classes.py`), or all in one
folder, the only class.

Hidden and system files are passed over, files of other kinds named with their count (`files.py`).
Crops, augmentation and corrupt images are `pictures.py`'s.

The data sets as LightningDataModules, to be named in a run's YAML: `class_path:
tessellar.data.ShapesData`.

The base class makes the loaders: a deterministic order from (seed, epoch), whole batches in
training, every sample once in validation, and no draw from the global random numbers, so that the
rest of a run does not depend on its loaders.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from tessellar.data.classes import order_classes
from tessellar.data.crops import Resize
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import digest, hold_out
from tessellar.data.files import (
    files_below,
    is_image,
    plain_files,
    sub_folders,
    tell_left_out,
)
from tessellar.data.framing import Crop, Framing
from tessellar.data.image_file import EXTENSIONS, read_image
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges


class Listing(NamedTuple):
    """The images of a folder: paths relative to it, in a fixed order, with their labels."""

    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> "Listing":
        """The listing of some of its rows."""
        return Listing(
            tuple(self.files[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            self.class_names,
        )


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
    flat = [file for file in beside if is_image(file)]
    classes = order_classes(sub_folders(root), str(root))
    if flat and classes:
        raise UserError(
            f"{root} holds images ({flat[0]}) and folders ({classes[0]}): move the images into class folders"
        )
    if flat:
        _tell(root, beside)
        return Listing(tuple(flat), (0,) * len(flat), (root.resolve().name,))
    below = {name: [f"{name}/{file}" for file in files_below(root / name)] for name in classes}
    images = {name: [file for file in files if is_image(file)] for name, files in below.items()}
    if not all(images.values()) or not images:
        empty = next((root / name for name, files in images.items() if not files), root)
        raise UserError(f"{empty} holds no image ({', '.join(EXTENSIONS)}){_others(empty)}")
    _tell(root, [*beside, *chain.from_iterable(below.values())])
    labels = tuple(label for label, name in enumerate(classes) for _ in images[name])
    return Listing(tuple(chain.from_iterable(images.values())), labels, classes)


def _tell(root: Path, files: Sequence[str]) -> None:
    left_out = tuple(file for file in files if not is_image(file))
    tell_left_out(str(root), len(files), left_out)


def _others(folder: Path) -> str:
    """The files that a folder without images does hold, for the message."""
    files = files_below(folder)
    return f"; it holds {len(files)} other files, such as {files[0]}" if files else ""


def split_listing(listing: Listing, val_share: float) -> tuple[Listing, Listing]:
    """Training and validation part, the latter the share `val_share` of each class (see `hold_out`)."""
    train, val = hold_out(listing.files, val_share, listing.labels)
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
        size: int,
        crop: Crop = "adm",
        flip: bool = False,
        ten_ratios: Sequence[float] = (1.1,),
        seed: int = 0,
        listing: Listing | None = None,
        max_corrupt: float = MAX_CORRUPT,
        resize: Resize | None = None,
    ) -> None:
        framing = Framing(size, crop, flip, tuple(ten_ratios), resize)
        listing = list_folder(root) if listing is None else listing
        self.root = Path(root)
        self.files = listing.files
        super().__init__(
            torch.tensor(listing.labels), listing.class_names, framing, seed, max_corrupt
        )

    def where(self, index: int) -> str:
        return str(self.root / self.files[index])

    def open(self, index: int) -> Image.Image:
        return read_image(self.root / self.files[index])

    def fingerprint(self) -> str:
        files = [(file, _size(os.path.join(self.root, file))) for file in self.files]
        labels = self.labels.tolist()
        size = self.framing.size
        views = self.framing.describe()
        return digest(set="image-folder", files=files, labels=labels, size=size, views=views)


@in_ranges
class ImageFolderData(ImageDataModule):
    """Your own images: one sub-folder a class, or one flat folder.

    Without `val_root`, the share `val_share` of the files is held out for validation: they are
    never trained on, which no published recipe does. `crop`, `flip`, `ten_ratios` and `resize`
    apply to training (see Framing); validation and reference statistics take the ADM centre crop.
    `name` is the folder's unless given. Corrupt images are skipped up to the share `max_corrupt`.
    """

    def __init__(
        self,
        root: str,
        size: int,
        val_root: str | None = None,
        val_share: float = 0.05,
        crop: Crop = "adm",
        flip: bool = True,
        ten_ratios: Sequence[float] = (1.1,),
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int | None = None,
        name: str | None = None,
        max_corrupt: float = MAX_CORRUPT,
        resize: Resize | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, balance)
        self.root = root
        self.max_corrupt = max_corrupt
        self.val_root = val_root
        self.val_share = val_share
        self.image_size = (size, size)
        self.crop: Crop = crop
        self.flip = flip
        self.ten_ratios = ten_ratios
        self.resize = resize
        self.name = name or Path(root).resolve().name

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
        listing = self._listings[0]
        if not augment:
            return self._still_folder(self.root, listing)
        framing = (self.image_size[0], self.crop, self.flip, self.ten_ratios, self.seed)
        return ImageFolder(self.root, *framing, listing, self.max_corrupt, self.resize)

    def val_dataset(self) -> ImageFolder:
        return self._still_folder(self.val_root or self.root, self._listings[1])

    def _still_folder(self, root: str, listing: Listing) -> ImageFolder:
        """One view an image: the ADM centre crop, or the image itself where it has the right size."""
        size = self.image_size[0]
        crop: Crop = "none" if self.crop == "none" else "adm"
        return ImageFolder(
            root, size, crop, seed=self.seed, listing=listing, max_corrupt=self.max_corrupt
        )
