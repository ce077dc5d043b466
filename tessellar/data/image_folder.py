"""ImageFolder: images in one sub-folder a class (in the order of `classes.py`), or all in one folder, the only class.

Crops, augmentation and corrupt images are `pictures.py`'s.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from tessellar.data.classes import order_classes
from tessellar.data.dataset import digest, hold_out
from tessellar.data.framing import Crop, Framing
from tessellar.data.image_file import EXTENSIONS, read_image
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.errors import UserError


class Listing(NamedTuple):
    """The images of a folder: paths relative to it, in a fixed order, with their labels."""

    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> "Listing":
        """The listing of some of its rows."""
        return Listing(tuple(self.files[i] for i in rows), tuple(self.labels[i] for i in rows), self.class_names)


def list_folder(root: str | Path) -> Listing:
    """The images below `root`; raises UserError if there are none, or some beside and some inside sub-folders."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; it should hold images, or one sub-folder of images for each class")
    flat = sorted(p.name for p in root.iterdir() if p.suffix.lower() in EXTENSIONS)
    folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    classes = order_classes(folders, str(root))
    if flat and classes:
        raise UserError(
            f"{root} holds images ({flat[0]}) and folders ({classes[0]}): move the images into class folders"
        )
    if flat:
        return Listing(tuple(flat), (0,) * len(flat), (root.resolve().name,))
    files = [_images_below(root, name) for name in classes]
    if not classes or not all(files):
        empty = root if not classes else root / classes[[bool(f) for f in files].index(False)]
        raise UserError(f"{empty} holds no image ({', '.join(EXTENSIONS)})")
    labels = tuple(label for label, group in enumerate(files) for _ in group)
    return Listing(tuple(file for group in files for file in group), labels, classes)


def _images_below(root: Path, name: str) -> list[str]:
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        below = Path(folder).relative_to(root)
        found += [(below / file).as_posix() for file in files if file.lower().endswith(EXTENSIONS)]
    return sorted(found)


def split_listing(listing: Listing, val_share: float) -> tuple[Listing, Listing]:
    """Training and validation part, the latter the share `val_share` of the files (see `hold_out`)."""
    train, val = hold_out(listing.files, val_share)
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
    ) -> None:
        framing = Framing(size, crop, flip, tuple(ten_ratios))
        listing = list_folder(root) if listing is None else listing
        self.root = Path(root)
        self.files = listing.files
        super().__init__(torch.tensor(listing.labels), listing.class_names, framing, seed, max_corrupt)

    def where(self, index: int) -> str:
        return str(self.root / self.files[index])

    def open(self, index: int) -> Image.Image:
        return read_image(self.root / self.files[index])

    def fingerprint(self) -> str:
        files = [(file, _size(os.path.join(self.root, file))) for file in self.files]
        labels, size, views = self.labels.tolist(), self.framing.size, self.framing.describe()
        return digest(set="image-folder", files=files, labels=labels, size=size, views=views)
