"""ImageFolder: images in one sub-folder a class (sorted by name), or all in one folder, which then is the only class.

Crops are those of `crops.py`. Random augmentation depends on (seed, epoch, index) alone. For caching tokens the
deterministic views of an image can be enumerated: `num_views` and `view(index, k)`.
"""

import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tessellar.data.batch import Batch
from tessellar.data.crops import CROPS_PER_RATIO, center_crop, random_crop, ten_crop
from tessellar.data.dataset import ImageDataset, digest
from tessellar.data.image_file import EXTENSIONS, read_image
from tessellar.data.randomness import derive, uniforms
from tessellar.errors import UserError
from tessellar.images import from_uint8

Crop = Literal["adm", "random", "ten", "none"]


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
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
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
    return Listing(tuple(file for group in files for file in group), labels, tuple(classes))


def _images_below(root: Path, name: str) -> list[str]:
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        below = Path(folder).relative_to(root)
        found += [(below / file).as_posix() for file in files if file.lower().endswith(EXTENSIONS)]
    return sorted(found)


def split_listing(listing: Listing, val_share: float) -> tuple[Listing, Listing]:
    """Training and validation part, the latter the share of files (at least one) whose path has the lowest hash.

    A file keeps its part when others come and go, but for the few at the border.
    """
    if len(listing.files) < 2 or not 0 < val_share < 1:
        raise UserError(
            f"cannot hold out {val_share} of {len(listing.files)} images; the share must be between 0 and 1"
        )
    ranked = sorted(range(len(listing.files)), key=lambda i: digest(file=listing.files[i]))
    held_out = min(ceil(val_share * len(ranked)), len(ranked) - 1)
    return listing.take(sorted(ranked[held_out:])), listing.take(sorted(ranked[:held_out]))


class ImageFolder(ImageDataset):
    """Images of `root` as `size` x `size` pixels.

    `crop` is "adm" (centre), "random", "ten" (one of ten crops for each of `ten_ratios`, drawn at each visit, mirror
    images included) or "none" (files have the right size). `flip` mirrors with probability 0.5. `listing` restricts the
    set to some of the files. Raises UserError naming the file for an image that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        crop: Crop = "adm",
        flip: bool = False,
        ten_ratios: Sequence[float] = (1.1,),
        seed: int = 0,
        listing: Listing | None = None,
    ) -> None:
        if crop not in ("adm", "random", "ten", "none") or size < 1:
            raise ValueError(f"crop is {crop!r} and size {size}; crop must be adm, random, ten or none, size positive")
        if crop == "ten" and (flip or not ten_ratios or min(ten_ratios) < 1):
            raise ValueError(
                f"ten-crop needs ratios of at least 1, not {ten_ratios}, and holds mirror images: flip off"
            )
        listing = list_folder(root) if listing is None else listing
        self.root = Path(root)
        self.size = size
        self.crop = crop
        self.flip = flip
        self.ten_ratios = tuple(ten_ratios)
        self.seed = seed
        self.files = listing.files
        self.labels = torch.tensor(listing.labels)
        self.class_names = listing.class_names

    @property
    def num_views(self) -> int:
        """How many images `view` can make of one file; raises ValueError for random crops, which have no end."""
        if self.crop == "random":
            raise ValueError("random crops cannot be enumerated; cache with crop 'adm' or 'ten'")
        return CROPS_PER_RATIO * len(self.ten_ratios) if self.crop == "ten" else 1 + self.flip

    def view(self, index: int, k: int) -> Tensor:
        """View `k` in [0, num_views) of one image, float32 [3, size, size]; without randomness."""
        if not 0 <= k < self.num_views:
            raise ValueError(f"view is {k}; this set has {self.num_views}")
        image = self._read(index)
        if self.crop == "ten":
            ratio, k = self.ten_ratios[k // CROPS_PER_RATIO], k % CROPS_PER_RATIO
            return _to_tensor(ten_crop(image, self.size, k, ratio))
        image = center_crop(image, self.size) if self.crop == "adm" else image
        return _to_tensor(ImageOps.mirror(image) if k else image)

    def batch(self, indices: Sequence[int]) -> Batch:
        draws = uniforms(derive(self.seed, self.epoch), indices, 4)
        images = [self._augmented(index, row) for index, row in zip(indices, draws, strict=True)]
        index = torch.as_tensor(indices)
        labels = self.labels[index]
        names = [self.class_names[label].replace("_", " ") for label in labels.tolist()]
        return {"image": torch.stack(images), "label": labels, "caption": names, "index": index}

    def _augmented(self, index: int, draws: np.ndarray) -> Tensor:
        if self.crop != "random":
            return self.view(index, int(draws[0] * self.num_views))
        image = random_crop(self._read(index), self.size, (draws[1], draws[2], draws[3]))
        return _to_tensor(ImageOps.mirror(image) if self.flip and draws[0] >= 0.5 else image)

    def _read(self, index: int) -> Image.Image:
        image = read_image(self.root / self.files[index])
        if self.crop == "none" and image.size != (self.size, self.size):
            width, height = image.size
            raise UserError(
                f"{self.root / self.files[index]} is {width}x{height}; crop 'none' needs {self.size}x{self.size}"
            )
        return image

    def fingerprint(self) -> str:
        files = [(file, (self.root / file).stat().st_size) for file in self.files]
        views = [self.crop, self.flip, self.ten_ratios if self.crop == "ten" else None]
        return digest(set="image-folder", files=files, labels=self.labels.tolist(), size=self.size, views=views)


def _to_tensor(image: Image.Image) -> Tensor:
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1)).contiguous()
