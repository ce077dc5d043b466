"""PictureDataset: what all readers of image files share: crops, mirror images, views for caches, and corrupt images.

A reader (folder, tar, Hugging Face) implements `open(index)` and `where(index)`. Crops are those of `crops.py`; random
augmentation depends on (seed, epoch, index) alone; corrupt images are treated as `damage.py` says.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from tessellar.data.batch import Batch
from tessellar.data.crops import CROPS_PER_RATIO, center_crop, random_crop, ten_crop
from tessellar.data.damage import Damage
from tessellar.data.dataset import ImageDataset
from tessellar.data.randomness import derive, uniforms
from tessellar.errors import UserError
from tessellar.images import from_uint8

Crop = Literal["adm", "random", "ten", "none"]
CROPS = ("adm", "random", "ten", "none")
MAX_CORRUPT = 0.01


class PictureDataset(ImageDataset):
    """Images as `size` x `size` pixels, with `labels` int64 [N] below the number of `class_names`.

    `crop` is "adm" (centre), "random", "ten" (one of ten crops for each of `ten_ratios`, drawn at each visit, mirror
    images included) or "none" (images have the right size). `flip` mirrors with probability 0.5. A corrupt image gives
    place to the next readable one; above the share `max_corrupt` of them a UserError is raised.
    """

    def __init__(
        self,
        labels: Tensor,
        class_names: tuple[str, ...],
        size: int,
        crop: Crop = "adm",
        flip: bool = False,
        ten_ratios: Sequence[float] = (1.1,),
        seed: int = 0,
        max_corrupt: float = MAX_CORRUPT,
    ) -> None:
        if crop not in CROPS or size < 1:
            raise ValueError(f"crop is {crop!r} and size {size}; crop must be one of {CROPS}, size positive")
        if crop == "ten" and (flip or not ten_ratios or min(ten_ratios) < 1):
            raise ValueError(
                f"ten-crop needs ratios of at least 1, not {ten_ratios}, and holds mirror images: flip off"
            )
        self.labels = labels
        self.class_names = class_names
        self.size = size
        self.crop = crop
        self.flip = flip
        self.ten_ratios = tuple(ten_ratios)
        self.seed = seed
        self.damage = Damage(len(labels), max_corrupt, self.where)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The whole image in mode RGB; raises UnreadableImage."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The image's place, for messages."""

    def caption(self, index: int) -> str:
        """Text to an image: the name of its class, unless the reader knows better."""
        return self.class_names[int(self.labels[index])].replace("_", " ")

    @property
    def corrupt(self) -> list[int]:  # type: ignore[override]
        return self.damage.corrupt

    @property
    def num_views(self) -> int:
        """How many images `views` can make of one; raises ValueError for random crops, which have no end."""
        if self.crop == "random":
            raise ValueError("random crops cannot be enumerated; cache with crop 'adm' or 'ten'")
        return CROPS_PER_RATIO * len(self.ten_ratios) if self.crop == "ten" else 1 + self.flip

    def view(self, index: int, k: int) -> Tensor:
        """View `k` in [0, num_views) of one image, float32 [3, size, size]; without randomness."""
        return self.views([index], k)["image"][0]

    def views(self, indices: Sequence[int], k: int) -> Batch:
        if not 0 <= k < self.num_views:
            raise ValueError(f"view is {k}; this set has {self.num_views}")
        sources, images = self._read(indices)
        return self._batch(indices, sources, [self._show(image, k) for image in images])

    def batch(self, indices: Sequence[int]) -> Batch:
        draws = uniforms(derive(self.seed, self.epoch), indices, 4)
        sources, images = self._read(indices)
        shown = [self._augmented(image, row) for image, row in zip(images, draws, strict=True)]
        return self._batch(indices, sources, shown)

    def _read(self, indices: Sequence[int]) -> tuple[list[int], list[Image.Image]]:
        """Images, and the indices of those that are really shown."""
        pairs = [self.damage.read(index, self.open) for index in indices]
        return [source for source, _ in pairs], [image for _, image in pairs]

    def _batch(self, indices: Sequence[int], sources: Sequence[int], images: Sequence[Image.Image]) -> Batch:
        for source, image in zip(sources, images, strict=True):
            if image.size != (self.size, self.size):
                width, height = image.size
                raise UserError(f"{self.where(source)} is {width}x{height}; crop 'none' needs {self.size}x{self.size}")
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return {
            "image": from_uint8(rearrange(pixels, "b h w c -> b c h w")).contiguous(),
            "label": self.labels[torch.as_tensor(sources)],
            "caption": [self.caption(source) for source in sources],
            "index": torch.as_tensor(indices),
        }

    def _augmented(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        if self.crop != "random":
            return self._show(image, int(draws[0] * self.num_views))
        image = random_crop(image, self.size, (draws[1], draws[2], draws[3]))
        return ImageOps.mirror(image) if self.flip and draws[0] >= 0.5 else image

    def _show(self, image: Image.Image, k: int) -> Image.Image:
        """View `k` of a whole image."""
        if self.crop == "ten":
            return ten_crop(image, self.size, k % CROPS_PER_RATIO, self.ten_ratios[k // CROPS_PER_RATIO])
        image = center_crop(image, self.size) if self.crop == "adm" else image
        return ImageOps.mirror(image) if k else image

    def framing(self) -> list[object]:
        """What crops and flips do, for fingerprints."""
        return [self.crop, self.flip, self.ten_ratios if self.crop == "ten" else None]
