"""Finite scalar quantization (FSQ, arXiv 2309.15505): every channel is squashed and rounded to a
few levels.

No codebook, no losses. The numerics are those of vector-quantize-pytorch and FlexTok: a level of
even count is shifted by half a step, so that the grid has a zero; the first channel is the least
significant digit of an id. `symmetric` instead spreads the levels evenly over [-1, 1], ends
included, so that codes quantize to themselves with `clamp`.
"""

from math import prod

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Categorical
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput

SLACK = 1e-3  # widens the range a little, so that the outermost levels are reached


class FSQ(Quantizer):
    """`levels[c]` values of channel c, in [-1, 1]; `clamp` cuts a symmetric range off instead of
    squashing it by tanh.

    Raises ValueError for fewer than 2 levels, and for `clamp` without `symmetric`.
    """

    has_neighbours = True

    def __init__(
        self, levels: tuple[int, ...], symmetric: bool = False, clamp: bool = False
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels are {list(levels)}; every channel needs at least 2")
        if clamp and not symmetric:
            raise ValueError("only a symmetric range can be clamped: set symmetric too")
        self.levels = tuple(int(level) for level in levels)
        self.symmetric = symmetric
        self.clamp = clamp
        self.kind, self.dim = Categorical(prod(self.levels)), len(self.levels)

    def _per_channel(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels, and the weight of each digit in an id."""
        levels = torch.tensor(self.levels, device=like.device)
        # Levels 8, 5, 5: digits count 1, 8, 40. The first channel is the least significant.
        basis = torch.tensor([prod(self.levels[:c]) for c in range(self.dim)], device=like.device)
        return levels, basis

    def bound(self, z: Tensor) -> Tensor:
        """z [..., C] squashed to the range of the levels, before rounding; symmetric: digits in [0,
        L - 1].
        """
        z = at_least_float32(z)
        levels, _ = self._per_channel(z)
        if self.symmetric:
            return (levels - 1) * ((z.clamp(-1, 1) if self.clamp else z.tanh()) + 1) / 2
        # An even L has levels -L/2 .. L/2 - 1: tanh is moved down by a half after a shift of z
        # that leaves 0 where it was.
        half = (levels - 1) * (1 + SLACK) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Codes of z [..., C] on the grid in [-1, 1], straight through the rounding."""
        bounded = self.bound(z)
        # Ties differ, as officially.
        rounded = (bounded + 0.5).floor() if self.symmetric else bounded.round()
        passed = bounded + (rounded - bounded).detach()
        levels, _ = self._per_channel(z)
        return 2 / (levels - 1) * passed - 1 if self.symmetric else passed / (levels // 2)

    def ids(self, codes: Tensor) -> Tensor:
        """Tokens of codes on the grid."""
        levels, basis = self._per_channel(codes)
        digits = (
            (codes + 1) / 2 * (levels - 1)
            if self.symmetric
            else codes * (levels // 2) + levels // 2
        )
        return digits.round().long().mul(basis).sum(-1)

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return self.ids(self.quantize(z))

    def logits(self, z: Tensor) -> Tensor:
        """Minus the squared distances [..., V], in units of the levels, of z before rounding."""
        bounded = self.bound(z)
        levels, basis = self._per_channel(z)
        digits = torch.arange(prod(self.levels), device=z.device)[:, None] // basis % levels
        codes = (digits if self.symmetric else digits - levels // 2).to(bounded.dtype)
        square = bounded.square().sum(-1, keepdim=True) + codes.square().sum(-1)
        return 2 * bounded @ codes.T - square

    def decode(self, tokens: Tensor) -> Tensor:
        levels, basis = self._per_channel(tokens)
        digits = tokens[..., None] // basis % levels
        return (
            2 / (levels - 1) * digits - 1
            if self.symmetric
            else (digits - levels // 2) / (levels // 2)
        )

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            quantized = self.quantize(z)
            return QuantizerOutput(quantized, self.ids(quantized.detach()), {})
