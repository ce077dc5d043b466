"""Binary spherical quantization (BSQ, arXiv 2406.07548): signs of a vector on the unit sphere,
divided by sqrt(dim).

Entropies are sums over groups of bits; per sample the sum is exact, because bits are independent
there, for the batch it is an upper bound. As in the official code, the straight-through output is
scaled after the gradient's shortcut, so the gradient is scaled too; `scaled_gradient=False` is what
vector-quantize-pytorch does.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.bits import bit_code
from tessellar.tokenizers.quantizers.entropy import (
    MOST_BITS,
    Entropies,
    all_signs,
    check_guard,
    entropies,
)


class BSQ(Quantizer):
    """Codes of `dim` signs and length 1; z is normalised here. A channel of exactly 0 becomes -1.

    Losses: commitment_weight * mean |z - code|^2 and entropy_weight / inv_temperature * (sample_weight * sample entropy
    - diversity * batch entropy), over groups of `group_bits`. `analytical` takes each bit as a group. Tokens:
    as bits, an id a group, or of the parts of `split` (quantizers/bits.py). Raises ValueError for sizes that misfit.
    """

    def __init__(
        self,
        dim: int,
        group_bits: int = 9,
        form: str = "bits",
        split: tuple[int, ...] | None = None,
        commitment_weight: float = 1.0,
        entropy_weight: float = 1.0,
        sample_weight: float = 1.0,
        diversity: float = 1.0,
        inv_temperature: float = 1.0,
        analytical: bool = True,
        scaled_gradient: bool = True,
        entropy_guard: str = "bsq",
        big_endian: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= group_bits <= MOST_BITS or dim % group_bits:
            raise ValueError(
                f"group_bits is {group_bits}; it must divide dim {dim} and be in [1, {MOST_BITS}]"
            )
        self.code = bit_code(dim, dim // group_bits, split, form, big_endian)
        self.kind = self.code.kind
        self.dim = dim
        self.group_bits = group_bits
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.sample_weight = sample_weight
        self.diversity = diversity
        self.inv_temperature = inv_temperature
        self.analytical = analytical
        self.scaled_gradient = scaled_gradient
        self.entropy_guard = check_guard(entropy_guard)

    def encode(self, z: Tensor) -> Tensor:
        return self.code.tokens(z > 0)

    def decode(self, tokens: Tensor) -> Tensor:
        return (self.code.bits(tokens).float() * 2 - 1) / self.dim**0.5

    def entropies(self, u: Tensor) -> Entropies:
        """Entropies [G] of unit vectors u [..., C] over the codes of each group of bits."""
        bits = 1 if self.analytical else self.group_bits
        grouped = rearrange(u, "... (g d) -> ... g d", d=bits)
        codes = all_signs(bits, u) / self.dim**0.5
        return entropies(2 * grouped @ codes.T * self.inv_temperature, self.entropy_guard)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            u = F.normalize(at_least_float32(z), dim=-1)
            tokens = self.encode(u)
            codes = self.decode(tokens).to(u.dtype)
            losses = {"commitment": self.commitment_weight * (codes - u).square().sum(-1).mean()}
            if self.entropy_weight:
                found = self.entropies(u)
                # Divided by the inverse temperature, as in the official code.
                penalty = (
                    self.sample_weight * found.sample.sum() - self.diversity * found.batch.sum()
                )
                losses["entropy"] = self.entropy_weight / self.inv_temperature * penalty
            return QuantizerOutput(self._pass(u, codes), tokens, losses)

    def _pass(self, u: Tensor, codes: Tensor) -> Tensor:
        if not self.training:
            return codes
        shortcut = u / self.dim**0.5 if self.scaled_gradient else u
        return shortcut + (codes - shortcut).detach()
