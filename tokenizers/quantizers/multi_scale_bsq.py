"""Multi-scale residual quantization by signs: bits from coarse to fine (Infinity, arXiv
2412.04431).

At each scale the rest is averaged down to p x p, its vectors are put on the unit sphere and
quantized to signs, and the codes are resized up linearly and taken off the rest. No phi, no
codebook. z is [B, h w, C] in raster order of the finest scale, tokens [B, sum p^2, C] bits scale by
scale. The released code has no losses; the commitment is ours.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Bits, Segment
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput


class MultiScaleBSQ(Quantizer):
    """Scales of `sides`, the last that of the latent grid. Raises ValueError for sides that do not
    grow.
    """

    def __init__(self, dim: int, sides: Sequence[int], commitment_weight: float = 0.25) -> None:
        super().__init__()
        if not sides or any(a >= b for a, b in pairwise((0, *sides))):
            raise ValueError(f"scales {tuple(sides)} must grow from at least 1")
        self.kind = Bits(dim)
        self.dim = dim
        self.sides = tuple(sides)
        self.commitment_weight = commitment_weight

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One grid a scale."""
        return tuple(Segment((side, side), self.kind, f"scale{side}") for side in self.sides)

    def _map(self, side: int, bits: Tensor) -> Tensor:
        """What a scale's bits [B, p p, C] add to the latent [B, C, h, w]."""
        h = rearrange(bits.float() * 2 - 1, "b (h w) c -> b c h w", h=side) / self.dim**0.5
        return (
            h
            if side == self.sides[-1]
            else F.interpolate(h, (self.sides[-1],) * 2, mode="bilinear")
        )

    def scan(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale by scale: bits [B, p p, C], and the map [B, C, h, w] that they add."""
        rest = rearrange(at_least_float32(z).detach(), "b (h w) c -> b c h w", h=self.sides[-1])
        for side in self.sides:
            small = (
                rest if side == self.sides[-1] else F.interpolate(rest, (side, side), mode="area")
            )
            bits = rearrange(small > 0, "b c h w -> b (h w) c").long()
            added = self._map(side, bits)
            rest = rest - added
            yield bits, added

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([bits for bits, _ in self.scan(z)], 1)

    def sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """Latents [B, C, h, w] summed over the first 1, 2, .. scales that `tokens` [B, n, C] cover."""
        total = torch.zeros(())
        start = 0
        for side in self.sides:
            if start + side**2 > tokens.shape[1]:
                return
            total = total + self._map(side, tokens[:, start : start + side**2])
            start += side**2
            yield total

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            *_, total = self.sums(tokens)
        return rearrange(total, "b c h w -> b (h w) c")

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1: the sum of all coarser maps, averaged down to
        the scale.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            sums = zip(self.sides[1:count], self.sums(tokens), strict=False)
            inputs = [F.interpolate(total, (side, side), mode="area") for side, total in sums]
        return torch.cat([rearrange(x, "b c h w -> b (h w) c") for x in inputs], 1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            tokens = self.encode(z)
            total = self.decode(tokens).to(z.dtype)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, total)}
            return QuantizerOutput(
                z + (total - z).detach() if self.training else total, tokens, losses
            )
