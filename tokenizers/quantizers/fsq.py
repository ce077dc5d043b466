"""Finite scalar quantization (FSQ, arXiv 2309.15505): every channel is squashed and rounded to a few levels.

No codebook, no losses. The numerics are those of vector-quantize-pytorch and FlexTok: a level of even count is shifted
by half a step, so that the grid has a zero; the first channel is the least significant digit of an id.
"""

from math import prod

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.tokenizers.layout import Categorical
from tessellar.tokenizers.quantizers.base import Quantizer, QuantizerOutput

SLACK = 1e-3  # widens the range a little, so that the outermost levels are reached


class FSQ(Quantizer):
    """`levels[c]` values of channel c, in [-1, 1]; raises ValueError for fewer than 2."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels are {list(levels)}; every channel needs at least 2")
        self.levels = tuple(int(level) for level in levels)
        self.kind, self.dim = Categorical(prod(self.levels)), len(self.levels)

    def _per_channel(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, half their number rounded down, and the weight of each digit in an id."""
        levels = torch.tensor(self.levels, device=like.device)
        basis = torch.tensor([prod(self.levels[:c]) for c in range(self.dim)], device=like.device)
        return levels, levels // 2, basis

    def bound(self, z: Tensor) -> Tensor:
        """z [..., C] squashed to the range of the levels, before rounding."""
        z = at_least_float32(z)
        levels = torch.tensor(self.levels, device=z.device)
        half = (levels - 1) * (1 + SLACK) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Codes of z [..., C] on the grid in [-1, 1], straight through the rounding."""
        bounded = self.bound(z)
        return (bounded + (bounded.round() - bounded).detach()) / self._per_channel(z)[1]

    def ids(self, codes: Tensor) -> Tensor:
        """Tokens of codes on the grid."""
        _, half, basis = self._per_channel(codes)
        return ((codes * half).round().long() + half).mul(basis).sum(-1)

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return self.ids(self.quantize(z))

    def decode(self, tokens: Tensor) -> Tensor:
        levels, half, basis = self._per_channel(tokens)
        return (tokens[..., None] // basis % levels - half) / half

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            quantized = self.quantize(z)
            return QuantizerOutput(quantized, self.ids(quantized.detach()), {})
