"""PictureDataset: what all readers of image files share: framing, views for caches, and the care of corrupt images.

A reader (folder, tar, Hugging Face) implements `open(index)` and `where(index)`. Random augmentation depends on (seed,
epoch, index) alone; corrupt images are treated as `damage.py` says.
"""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar.data.batch import Batch
from tessellar.data.damage import Damage
from tessellar.data.dataset import ImageDataset
from tessellar.data.framing import DRAWS, Framing
from tessellar.data.randomness import derive, uniforms
from tessellar.images import from_uint8

MAX_CORRUPT = 0.01


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as float32 [B, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return from_uint8(rearrange(pixels, "b h w c -> b c h w")).contiguous()


class PictureDataset(ImageDataset):
    """Images as `framing` says, with `labels` int64 [N] below the number of `class_names`.

    A corrupt image gives place to the next readable one; above the share `max_corrupt` of them a UserError is raised.
    """

    def __init__(
        self,
        labels: Tensor,
        class_names: tuple[str, ...],
        framing: Framing,
        seed: int = 0,
        max_corrupt: float = MAX_CORRUPT,
    ) -> None:
        self.labels = labels
        self.class_names = class_names
        self.framing = framing
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

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of samples, whose images are not read."""
        return [self.caption(index) for index in indices]

    @property
    def corrupt(self) -> list[int]:  # type: ignore[override]
        return self.damage.corrupt

    @property
    def num_views(self) -> int:
        """How many views an image has; raises UserError for random crops, which have no end."""
        return self.framing.num_views

    def view(self, index: int, k: int) -> Tensor:
        """View `k` in [0, num_views) of one image, float32 [3, size, size]; without randomness."""
        source, image = self.damage.read(index, self.open)
        return to_tensor([self.framing.view(image, k, self.where(source))])[0]

    def views(self, index: int) -> Batch:
        source, image = self.damage.read(index, self.open)
        shown = [self.framing.view(image, k, self.where(source)) for k in range(self.num_views)]
        return self._batch([index] * len(shown), [source] * len(shown), shown)

    def batch(self, indices: Sequence[int]) -> Batch:
        draws = uniforms(derive(self.seed, self.epoch), indices, DRAWS).tolist()
        read = [self.damage.read(int(index), self.open) for index in indices]
        shown = [self.framing.draw(image, row, self.where(i)) for (i, image), row in zip(read, draws, strict=True)]
        return self._batch(indices, [source for source, _ in read], shown)

    def _batch(self, indices: Sequence[int], sources: Sequence[int], shown: Sequence[Image.Image]) -> Batch:
        """`sources` are the images really shown: others than `indices` where corrupt ones were skipped."""
        return {
            "image": to_tensor(shown),
            "label": self.labels[list(sources)],
            "caption": [self.caption(source) for source in sources],
            "index": torch.as_tensor(indices),
        }
