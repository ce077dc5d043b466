"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738).

In the form of StyleGAN-T's, of VAR's authors and of ResTok's (arXiv 2601.03955): of colour,
translation and cutout each happens to a whole batch or not at all; strengths and places are of each
image. The strength of colours and the 0 that fills what is cut or comes in mean different things
for images in [-1, 1], as VAR's authors feed them, and in [0, 1], as ResTok does (brightness shifts
twice as far, the fill is black, not grey); the order differs too.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tessellar.protocol.configured import Configured

TRANSLATION = 0.125  # of the sides, at most


Step = Literal["translation", "colour", "cutout"]


class DiffAugment(Configured, nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to images of the same size, whose values may leave that range.

    `probability` of each of the three; `cutout` is the side of the square that is filled, as a
    share of the image's; `order` is the order of what happens. `unit_range`: augment the images in
    [0, 1] and give them back in [-1, 1]. VAR's authors use the defaults, ResTok colour,
    translation, cutout in [0, 1]. Raises ValueError for shares outside of [0, 1] and for an order
    that does not hold each of the three once.
    """

    def __init__(
        self,
        probability: float = 0.5,
        cutout: float = 0.2,
        unit_range: bool = False,
        order: tuple[Step, Step, Step] = ("translation", "colour", "cutout"),
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1 or not 0 <= cutout <= 1:
            raise ValueError(f"probability {probability} and cutout {cutout} lie between 0 and 1")
        if sorted(order) != ["colour", "cutout", "translation"]:
            raise ValueError(
                f"order is {list(order)}; it holds translation, colour and cutout, each once"
            )
        self.probability = probability
        self.cutout = cutout
        self.unit_range = unit_range
        self.order = tuple(order)

    def forward(self, images: Tensor) -> Tensor:
        if self.unit_range:
            return 2 * self._augmented((images + 1) / 2) - 1
        return self._augmented(images)

    def _augmented(self, images: Tensor) -> Tensor:
        steps: dict[Step, Callable[[Tensor], Tensor]] = {
            "translation": translate,
            "colour": colour,
            "cutout": partial(cut_out, share=self.cutout),
        }
        happens = torch.rand(3, device="cpu") < self.probability
        for step, now in zip(self.order, happens.tolist(), strict=True):
            if now:
                images = steps[step](images)
        return images


def colour(images: Tensor) -> Tensor:
    """Brightness +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5, of each image."""
    brightness, saturation, contrast = torch.rand(
        3, len(images), 1, 1, 1, device=images.device, dtype=images.dtype
    )
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation * 2
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translate(images: Tensor) -> Tensor:
    """Each image moved by up to an eighth of its sides; what comes in is 0."""
    (rows, inside_h), (columns, inside_w) = (shifted_places(images, side) for side in (2, 3))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * (inside_h[:, None, :, None] & inside_w[:, None, None, :])


def shifted_places(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where along a side each place of each image comes from, int64 [B, size] clamped, and whether
    that is inside.
    """
    size = images.shape[side]
    most = round(size * TRANSLATION)
    by = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
    source = torch.arange(size, device=images.device) + by
    return source.clamp(0, size - 1), (source >= 0) & (source < size)


def cut_out(images: Tensor, share: float) -> Tensor:
    """A rectangle of `share` of the sides set to 0, centred anywhere in each image."""
    height, width = (cut_places(images, side, share) for side in (2, 3))
    return images.masked_fill(height[:, None, :, None] & width[:, None, None, :], 0.0)


def cut_places(images: Tensor, side: int, share: float) -> Tensor:
    """Which places of a side lie in each image's rectangle, bool [B, size]."""
    size = images.shape[side]
    length = round(size * share)
    first = (
        torch.randint(0, size + 1 - length % 2, (len(images), 1), device=images.device)
        - length // 2
    )
    place = torch.arange(size, device=images.device)
    return (place >= first) & (place < first + length)
