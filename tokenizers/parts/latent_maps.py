"""What tokenizers share whose decoder draws maps under ordered tokens (FlexTok, arXiv 2502.13967;
Semanticist, arXiv 2503.08685): the latents of a frozen VAE, or the pixels.

Maps are [B, C, h, w], cut into patches for a transformer. Any prefix of the tokens decodes, and all
prefixes of an image start from the same noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from tessellar.protocol.layout import Continuous
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.kl_vae import KLVAE


@dataclass(frozen=True)
class Grid:
    """Maps [B, channels, side, side] cut into squares of `patch`; `table` is the side of the table
    of positions.
    """

    channels: int
    side: int
    patch: int
    table: int

    @property
    def patches(self) -> int:
        """Patches along a side."""
        return self.side // self.patch

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch**2

    def split(self, maps: Tensor) -> Tensor:
        """Maps to patches [B, n, patch_dim], the channels of a pixel side by side."""
        return rearrange(maps, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)

    def join(self, patches: Tensor) -> Tensor:
        """The inverse of `split`."""
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.patches,
            p=self.patch,
            q=self.patch,
        )


class LatentMaps(Tokenizer):
    """Draws latents of `vae`, which stays as it is, or pixels where there is none; `grid` says how
    they are cut.
    """

    vae: KLVAE | None
    grid: Grid

    def train(self, mode: bool = True) -> Self:
        """The VAE stays in eval mode."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    @torch.no_grad()
    def latents(self, images: Tensor, sample: bool = False) -> Tensor:
        """What is drawn, [B, C, h, w]: scaled latents of images (drawn, or the mode), or the images."""
        self.check_images(images)
        if self.vae is None:
            return images
        tokens = self.vae.draw(images) if sample else self.vae.encode(images)
        return rearrange(tokens, "b (h w) c -> b c h w", h=self.grid.side)

    @torch.no_grad()
    def render(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of what was drawn."""
        if self.vae is None:
            return latents
        return self.vae.decode(rearrange(latents, "b c h w -> b (h w) c").contiguous())

    def check_length(self, length: int | None) -> None:
        """Raise ValueError unless images have a prefix of that length (None: all tokens)."""
        if length is not None and not 1 <= length <= self.layout.length:
            raise ValueError(f"length is {length}; it must be in [1, {self.layout.length}]")


def kept_lengths(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """How many tokens each image keeps of tokens [B, k, ...]: `lengths` [B], or all k of them.

    Raises ValueError for lengths that are not in [1, k].
    """
    batch, count = tokens.shape[:2]
    if lengths is None:
        return torch.full((batch,), count, device=tokens.device)
    if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > count)).any()):
        raise ValueError(f"lengths are {lengths.tolist()}; give {batch} in [1, {count}]")
    return lengths


def streams_of(tokens: Tensor, noise: Noise | None, seeds: Callable[[Tensor], list[int]]) -> Noise:
    """A stream for each image of tokens [B, k, ...]: of `noise`, or by `seeds` of its first token.

    Raises ValueError for another number of streams.
    """
    if noise is None:
        return Noise(seeds(tokens[:, 0]), tokens.device)
    if len(noise) != len(tokens):
        raise ValueError(f"noise has {len(noise)} streams for {len(tokens)} images")
    return noise


def grid_of(vae: KLVAE | None, image_size: int, patch: int, table: int | None) -> Grid:
    """Raises ValueError unless the images, the VAE's latents and the patches fit each other."""
    channels = 3
    side = image_size
    if vae is not None:
        kind = vae.layout.segments[0].kind
        shape = vae.layout.grid
        if (
            vae.image_size != (image_size, image_size)
            or shape is None
            or not isinstance(kind, Continuous)
        ):
            raise ValueError(
                f"the VAE gives {vae.layout} of images {vae.image_size}, not of {image_size}x{image_size}"
            )
        channels = kind.dim
        side = shape[0]
    if side % patch:
        raise ValueError(f"patch_size {patch} does not divide maps of {side}x{side}")
    if table is not None and table < side // patch:
        raise ValueError(f"table is {table}; there are {side // patch}x{side // patch} patches")
    return Grid(channels, side, patch, table or side // patch)
