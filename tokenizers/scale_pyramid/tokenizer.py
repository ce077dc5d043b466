"""Scale pyramid: the latents of another tokenizer at several resolutions, coarse to fine (xAR's X =
scale).

arXiv 2502.20388, algorithm 1: entity i is the latent itself, resized to s_i x s_i, not a residual;
only the last scale is decoded. The paper names no way of resizing and its pseudo-code defaults to
`nearest`, which copies a quarter of the next scale verbatim; `area`, our default, averages.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.protocol.layout import Layout, Segment
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.parts.inner import inner_tokenizer

ResizeMode = Literal["nearest", "area", "bicubic"]


class ScalePyramid(Tokenizer):
    """`tokenizer` (or the path of one), frozen, whose tokens are one square grid of continuous
    latents.

    `sides` are those of the scales; by default 1, 2, 4, ... up to the grid's. Raises UserError for
    other layouts, and for sides that do not grow to the grid's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        sides: tuple[int, ...] | None = None,
        mode: ResizeMode = "area",
    ) -> None:
        super().__init__()
        tokenizer = inner_tokenizer(self, tokenizer)
        grid = tokenizer.layout.grid
        if grid is None or grid[0] != grid[1] or not tokenizer.layout.is_continuous:
            raise UserError(
                f"a scale pyramid needs one square grid of continuous latents, not {tokenizer.layout}"
            )
        self.sides = tuple(sides) if sides else default_sides(grid[0])
        if self.sides[-1] != grid[0] or any(a >= b for a, b in pairwise((0, *self.sides))):
            raise UserError(f"scales {self.sides} must grow to the side of the latents, {grid[0]}")
        kind = tokenizer.layout.segments[0].kind
        self.tokenizer = tokenizer
        self.image_size = tokenizer.image_size
        self.mode: ResizeMode = mode
        self.layout = Layout(
            tuple(Segment((side, side), kind, f"scale{side}") for side in self.sides)
        )
        self.requires_grad_(False)

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.last_layer

    def encode(self, images: Tensor) -> Tensor:
        return self._pyramid(self.tokenizer.encode(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._pyramid(self.tokenizer.draw(images, generator))

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.tokenizer.decode(tokens[:, self.layout.starts[-2] :])

    def forward(self, images: Tensor) -> TokenizerOutput:
        """There is nothing to train: the reconstruction of the inner tokenizer."""
        tokens = self.encode(images)
        return TokenizerOutput(self.decode(tokens), tokens, {})

    def _pyramid(self, tokens: Tensor) -> Tensor:
        return pyramid(
            rearrange(tokens, "b (h w) c -> b c h w", h=self.sides[-1]), self.sides, self.mode
        )


def default_sides(side: int) -> tuple[int, ...]:
    """Halves down to 1: 1, 2, 4, 8, 16 for 16; an odd side stops there."""
    return (*(default_sides(side // 2) if side % 2 == 0 else ()), side)


def pyramid(maps: Tensor, sides: Sequence[int], mode: ResizeMode = "area") -> Tensor:
    """Latent maps [B, C, H, W] at all scales, each in raster order, coarse to fine: [B, N, C]."""
    scales = [
        maps if side == maps.shape[-1] else F.interpolate(maps, (side, side), mode=mode)
        for side in sides
    ]
    return torch.cat([rearrange(scale, "b c h w -> b (h w) c") for scale in scales], dim=1)
