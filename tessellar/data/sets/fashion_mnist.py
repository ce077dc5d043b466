"""Fashion-MNIST (arXiv 1708.07747) from its four IDX files: 60,000 training and 10,000 test images
of 28 x 28.

Zero-padded to 32 x 32 (black), the grey channel three times. Everything is read once and kept as
bytes, so a batch is a slice. There is no third split: the test images are also the validation
images.

The data sets as LightningDataModules, to be named in a run's YAML: `class_path:
tessellar.data.ShapesData`.

The base class makes the loaders: a deterministic order from (seed, epoch), whole batches in
training, every sample once in validation, and no draw from the global random numbers, so that the
rest of a run does not depend on its loaders.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from tessellar.data.batch import Batch
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import ImageDataset, digest
from tessellar.data.sets.idx import find_idx, read_idx
from tessellar.errors import UserError
from tessellar.images import from_uint8
from tessellar.protocol.arguments import in_ranges
from tessellar.randomness import derive, uniforms

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


PREFIX = {"train": "train", "test": "t10k"}


SIDE = 28


PADDING = 2
PADDED = SIDE + 2 * PADDING


def photo_of(name: str) -> str:
    """For example 'a photo of an ankle boot'."""
    return f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


class FashionMNIST(ImageDataset):
    """One split from the folder `root`, which holds the IDX files (plain or .gz); raises UserError
    if they do not. Of another `size` than 32 images are resampled, bilinearly: nothing new is in them.
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test"] = "train",
        flip: bool = False,
        seed: int = 0,
        size: int = PADDED,
    ) -> None:
        images_file = find_idx(Path(root), f"{PREFIX[split]}-images-idx3-ubyte")
        labels_file = find_idx(Path(root), f"{PREFIX[split]}-labels-idx1-ubyte")
        pixels = read_idx(images_file, axes=3)
        labels = read_idx(labels_file, axes=1)
        if pixels.shape[1:] != (SIDE, SIDE) or len(pixels) != len(labels) or len(labels) == 0:
            raise UserError(
                f"{images_file} holds {pixels.shape} pixels and {labels_file} {len(labels)} labels: no match"
            )
        if labels.max() >= len(CLASS_NAMES):
            raise UserError(
                f"{labels_file} holds label {labels.max()}; labels must be below {len(CLASS_NAMES)}"
            )
        self.flip = flip
        self.seed = seed
        self.size = size
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self._pixels = torch.from_numpy(
            np.pad(pixels, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        )

    @property
    def num_views(self) -> int:
        return 1 + self.flip

    def batch(self, indices: Sequence[int]) -> Batch:
        draws = uniforms(derive(self.seed, self.epoch), indices, 1)[:, 0]
        return self._show(indices, torch.from_numpy((draws >= 0.5) & self.flip))

    def views(self, index: int) -> Batch:
        return self._show([index] * self.num_views, torch.arange(self.num_views) > 0)

    def _show(self, indices: Sequence[int], flipped: Tensor) -> Batch:
        index = torch.as_tensor(indices)
        pixels = self._pixels[index]
        pixels = torch.where(rearrange(flipped, "b -> b 1 1"), pixels.flip(-1), pixels)
        labels = self.labels[index]
        images = repeat(from_uint8(pixels), "b h w -> b c h w", c=3).contiguous()
        if self.size != PADDED:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        return {
            "image": images,
            "label": labels,
            "caption": [photo_of(CLASS_NAMES[label]) for label in labels.tolist()],
            "index": index,
        }

    def fingerprint(self) -> str:
        content = hashlib.sha256(self._pixels.numpy().tobytes() + self.labels.numpy().tobytes())
        facts = {"set": "fashion-mnist", "content": content.hexdigest(), "flip": self.flip}
        return digest(**facts if self.size == PADDED else {**facts, "size": self.size})


@in_ranges
class FashionMNISTData(ImageDataModule):
    """Fashion-MNIST, 32 x 32, or resampled to `size`; `root` holds its four IDX files. The test images
    are also the validation images.
    """

    name = "fashion-mnist"
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        num_workers: int = 0,
        flip: bool = False,
        seed: int | None = None,
        size: int = PADDED,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.image_size = (size, size)
        self.root = root
        self.flip = flip

    @cached_property
    def _plain(self) -> FashionMNIST:
        return FashionMNIST(self.root, "train", size=self.image_size[0])

    @cached_property
    def _flipped(self) -> FashionMNIST:
        return FashionMNIST(self.root, "train", flip=True, seed=self.seed, size=self.image_size[0])

    @cached_property
    def _test(self) -> FashionMNIST:
        return FashionMNIST(self.root, "test", size=self.image_size[0])

    def train_dataset(self, augment: bool = True) -> FashionMNIST:
        return self._flipped if augment and self.flip else self._plain

    def val_dataset(self) -> FashionMNIST:
        return self._test
