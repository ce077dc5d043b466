"""PictureDataset: what all readers of image files share: framing, views for caches, and the care of
corrupt images.

A reader (folder, tar, Hugging Face) implements `open(index)` and `where(index)`, and
`own_texts(index)` where it has captions. Random augmentation depends on (seed, epoch, index) alone;
corrupt images are treated as `damage.py` says.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar.data.batch import Batch, normalised
from tessellar.data.captions import class_text, draw_captions, pick, tell_missing
from tessellar.data.damage import Damage
from tessellar.data.dataset import ImageDataset
from tessellar.data.framing import DRAWS, Framing
from tessellar.errors import UserError
from tessellar.images import from_uint8
from tessellar.randomness import derive, uniforms

MAX_CORRUPT = 0.01


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as uint8 [B, 3, H, W]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(pixels, "b h w c -> b c h w").contiguous()


class PictureDataset(ImageDataset):
    """Images as `framing` says, with `labels` int64 [N] below the number of `class_names`.

    A corrupt image gives place to the next readable one; above the share `max_corrupt` of them a
    UserError is raised. `captioned` bool [N] tells which images have captions of their own; of
    several, a visit shows one drawn from (seed, epoch, index) with `vary_captions`, else the first.
    An image without one has the name of its class where that is a text, else an empty one; that
    some are missing is said once.
    """

    def __init__(
        self,
        labels: Tensor,
        class_names: tuple[str, ...],
        framing: Framing,
        seed: int = 0,
        max_corrupt: float = MAX_CORRUPT,
        captioned: Tensor | None = None,
        vary_captions: bool = False,
    ) -> None:
        self.labels = labels
        self.class_names = class_names
        self.framing = framing
        self.seed = seed
        self.damage = Damage(len(labels), max_corrupt, self.where)
        self.vary_captions = vary_captions
        # Set by a loader of batches of several sizes.
        self.in_buckets: Callable[[int], Framing] | None = None
        self.own_captions = captioned is not None and bool(captioned.any())
        named = [class_text(class_names, label) for label in labels.unique().tolist()]
        self.has_captions = self.own_captions or any(named)
        if captioned is not None and self.own_captions and not captioned.all():
            missing = (~captioned).nonzero().flatten().tolist()
            names = [class_text(class_names, label) for label in range(len(class_names))]
            instead = "the name of the class is taken" if any(names) else "an empty text is taken"
            tell_missing(len(missing), len(captioned), self.where(missing[0]), instead)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The whole image in mode RGB; raises UnreadableImage."""

    def shape(self, index: int) -> tuple[int, int]:
        """(height, width) of the whole image; a reader that finds it without decoding says so."""
        image = self.open(index)
        return image.height, image.width

    @abstractmethod
    def where(self, index: int) -> str:
        """The image's place, for messages."""

    def own_texts(self, index: int) -> tuple[str, ...]:
        """Captions that the reader finds to an image; none unless it knows better."""
        return ()

    def texts(self, index: int) -> tuple[str, ...]:
        """All captions of an image: its own, or the name of its class."""
        return self.own_texts(index) or class_text(self.class_names, int(self.labels[index]))

    def caption(self, index: int) -> str:
        """The caption that a visit of this epoch shows."""
        return self._captions([index], [index])[0]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of samples, whose images are not read; raises UserError for a set without any."""
        if not self.has_captions:
            raise UserError(
                f"this data set gives no captions ({self.where(0)} has none, nor any other image)"
            )
        return self._captions(indices, indices)

    def _captions(self, indices: Sequence[int], sources: Sequence[int]) -> list[str]:
        texts = list(map(self.texts, sources))
        if not self.vary_captions:
            return [pick(several, 0.0) for several in texts]
        return draw_captions(texts, indices, self.seed, self.epoch)

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
        return from_uint8(to_pixels([self.framing.view(image, k, self.where(source))])[0])

    def views(self, index: int) -> Batch:
        source, image = self.damage.read(index, self.open)
        shown = [self.framing.view(image, k, self.where(source)) for k in range(self.num_views)]
        batch = normalised(self._pixels([index] * len(shown), [source] * len(shown), shown))
        if self.has_captions:
            texts = self.texts(source)
            batch["caption"] = [pick(texts, 0.0)] * len(shown)
            batch["texts"] = list(texts)
        return batch

    def batch(self, indices: Sequence[int]) -> Batch:
        return normalised(self.__getitems__(indices))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """As `batch`, with images uint8 [B, 3, H, W]: what a loader's worker hands over, a quarter
        of the bytes.
        """
        draws = uniforms(derive(self.seed, self.epoch), indices, DRAWS).tolist()
        sources = []
        shown = []
        for index, row in zip(indices, draws, strict=True):
            source, image = self.damage.read(int(index), self.open)
            sources.append(source)
            framing = self.framing_of(int(index))
            shown.append(framing.draw(image, row, self.where(source), self.epoch))
        return self._pixels(indices, sources, shown)

    def framing_of(self, index: int) -> Framing:
        """How a sample is framed in training: to the size of its bucket, where there are some."""
        return self.framing if self.in_buckets is None else self.in_buckets(index)

    def _pixels(
        self, indices: Sequence[int], sources: Sequence[int], shown: Sequence[Image.Image]
    ) -> Batch:
        """`sources` are the images really shown: others than `indices` where corrupt ones were
        skipped.
        """
        batch: Batch = {
            "image": to_pixels(shown),
            "label": self.labels[list(sources)],
            "index": torch.as_tensor(indices),
        }
        if self.has_captions:
            batch["caption"] = self._captions(indices, sources)
        return batch
