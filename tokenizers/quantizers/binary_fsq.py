"""Binary finite scalar quantization: each channel becomes -1 or 1, straight through a squashed copy
(BAR, arXiv 2602.09024; FSQ, arXiv 2309.15505, with two levels).

Published (`centred` False) is FSQ's rounding of two levels: its threshold is z = -3.80, not 0, where
the slope is 0.002, so that training begins with nearly all bits 1. Ours is tanh with its threshold
at 0. Neither has a loss. Tokens are bits; no index is formed, so there may be any number of them.
"""

import math

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Bits
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.fsq import SLACK


class BinaryFSQ(Quantizer):
    """Codes of `dim` signs. Raises ValueError for no channel."""

    def __init__(self, dim: int, centred: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; a token needs at least one bit")
        self.kind = Bits(dim)
        self.dim = dim
        self.centred = centred

    def bound(self, z: Tensor) -> Tensor:
        """z squashed to (-1, 1), before its sign is taken: a code of exactly 0 becomes 1."""
        z = at_least_float32(z)
        if self.centred:
            return z.tanh()
        # h tanh(z + s) - 1/2 rounds to -1 or 0; twice that and 1 is the code.
        half = (1 + SLACK) / 2
        shift = math.atanh(0.5 / half)
        return 2 * half * torch.tanh(z + shift)

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return (self.bound(z) >= 0).long()

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.float() * 2 - 1

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            tokens = self.encode(z)
            codes = self.decode(tokens).to(bounded.dtype)
            # Outside of training the codes are exact.
            passed = bounded + (codes - bounded).detach() if self.training else codes
            return QuantizerOutput(passed, tokens, {})
