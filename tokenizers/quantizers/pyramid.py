"""Pyramids of scales: what residual quantizers of maps from coarse to fine share (VAR, arXiv
2404.02905).

At each scale the rest is averaged down to p x p and quantized; what its tokens add is resized up
and taken off the rest. Vectors are [B, h w, C] in raster order of the finest scale, tokens [B, sum
p^2, ...] scale by scale, maps [B, C, h, w].
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Segment
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def rows(maps: Tensor) -> Tensor:
    """Maps [B, C, h, w] as vectors [B, h w, C]."""
    return rearrange(maps, "b c h w -> b (h w) c")


class PyramidQuantizer(Quantizer):
    """Scales of `sides`, the last that of the latent grid.

    Subclasses call `set_sides`, and say which tokens are nearest to vectors and what the tokens of
    a scale add.
    """

    has_neighbours = False  # a token is of a rest, not of the latent
    sides: tuple[int, ...]

    def set_sides(self, sides: Sequence[int]) -> None:
        """Raises ValueError for sides that do not grow."""
        if not sides or any(a >= b for a, b in pairwise((0, *sides))):
            raise ValueError(f"scales {tuple(sides)} must grow from at least 1")
        self.sides = tuple(sides)

    @abstractmethod
    def nearest(self, z: Tensor) -> Tensor:
        """Tokens [B, n, ...] of averaged rests [B, n, C] of one scale."""

    @abstractmethod
    def added(self, scale: int, tokens: Tensor) -> Tensor:
        """What a scale's tokens [B, p p, ...] add to the latent [B, C, h, w]."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the map of each scale; a sequence is a map of one row."""
        return tuple((side, side) for side in self.sides)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One grid a scale."""
        return tuple(Segment((side, side), self.kind, f"scale{side}") for side in self.sides)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens before each scale, and of all."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + prod(shape))
        return tuple(ends)

    def scan(
        self, z: Tensor, skipped: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scale by scale: averaged rests [B, p p, C], their tokens, and the map [B, C, h, w] of
        those.

        The `skipped` scale takes nothing off the rest. Gradients reach z through the rests.
        """
        rest = rearrange(z, "b (h w) c -> b c h w", h=self.shapes[-1][0]).contiguous()
        for scale, shape in enumerate(self.shapes):
            # Averaged down, so that a token says what its whole cell lacks.
            latents = rows(averaged(rest, shape))
            tokens = self.nearest(latents.detach())
            added = self.added(scale, tokens)
            # The rest is a target for the next scales: no gradient runs along what was taken.
            if scale != skipped:
                rest = rest - added.detach()
            yield latents, tokens, added

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([tokens for _, tokens, _ in self.scan(at_least_float32(z))], 1)

    def sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """Latents [B, C, h, w] summed over the first 1, 2, .. scales that `tokens` [B, n, ...]
        cover.
        """
        total = None
        for scale, (start, end) in enumerate(pairwise(self.ends)):
            if end > tokens.shape[1]:
                return
            added = self.added(scale, tokens[:, start:end])
            total = added if total is None else total + added
            yield total

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            *_, total = self.sums(tokens)
        return rows(total)

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1: the sum of all coarser maps, averaged down to
        the scale.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            inputs = []
            sums = self.sums(tokens[:, : self.ends[count - 1]])
            for shape, total in zip(self.shapes[1:count], sums, strict=True):
                inputs.append(rows(averaged(total, shape)))
        return torch.cat(inputs, 1)


class PyramidVQ(PyramidQuantizer, VectorQuantizer):
    """Scales of one codebook, whose codes come from the rests of all of them where they are
    initialised from data or restarted.
    """

    @torch.no_grad()
    def candidates(self, z: Tensor) -> Tensor:
        if self.init_step is None and self.restart_every is None:
            return z  # nobody asks for them
        rests = [rest for rest, _, _ in self.scan(z)]
        return self._normalize(torch.cat(rests, 1))


def averaged(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] averaged down to `shape`."""
    return maps if shape == maps.shape[-2:] else F.interpolate(maps, shape, mode="area")


def enlarged(vectors: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """Vectors [B, p p, C] of a scale as a map [B, C, side, side]."""
    own = round(vectors.shape[1] ** 0.5)
    maps = rearrange(vectors, "b (h w) c -> b c h w", h=own).contiguous()
    return maps if own == side else F.interpolate(maps, (side, side), mode=mode)
