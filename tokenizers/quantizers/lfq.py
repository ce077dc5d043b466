"""Lookup-free quantization: each channel becomes its sign (MAGVIT-v2, arXiv 2310.05737;
Open-MAGVIT2, 2409.04410).

With `groups` the entropies are those of small codebooks of dim / groups bits (WeTok, arXiv
2508.05599; BitDance), which makes many bits affordable. Gradients pass straight through. A norm
before the quantizer helps training. Different from the official code: in eval mode codes are exact,
not z + (codes - z).
"""

from einops import rearrange
from torch import Tensor, autocast
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


class LFQ(Quantizer):
    """Codes of `dim` signs; a channel of exactly 0 becomes -1.

    Tokens: an id a group, or of the parts of `split`, or `form="bits"` (quantizers/bits.py).
    `temperature` divides the affinities 2 z.c of the entropies; `shared_histogram` counts the codes
    of all groups together. Raises ValueError for sizes that do not fit, and for groups too large
    for an entropy.
    """

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        form: str = "index",
        split: tuple[int, ...] | None = None,
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.25,
        diversity: float = 1.0,
        temperature: float = 0.01,
        shared_histogram: bool = True,
        entropy_guard: str = "magvit",
        big_endian: bool = False,
    ) -> None:
        super().__init__()
        self.code = bit_code(dim, groups, split, form, big_endian)
        if entropy_weight and dim // groups > MOST_BITS:
            raise ValueError(
                f"the entropy of {dim // groups} bits cannot be enumerated; use more groups or no entropy"
            )
        self.kind = self.code.kind
        self.dim = dim
        self.groups = groups
        self.entropy_weight = entropy_weight
        self.commitment_weight = commitment_weight
        self.diversity = diversity
        self.temperature = temperature
        self.shared_histogram = shared_histogram
        self.entropy_guard = check_guard(entropy_guard)

    def encode(self, z: Tensor) -> Tensor:
        return self.code.tokens(z > 0)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.code.bits(tokens).float() * 2 - 1

    def entropies(self, z: Tensor) -> Entropies:
        """Entropies [G] of z [..., C] over the signs of each group; G = 1 where they share a
        histogram.
        """
        grouped = rearrange(z, "... (g d) -> ... g d", g=self.groups)
        # -|z - c|^2 up to what all codes share: codes of signs have one norm.
        logits = 2 * grouped @ all_signs(grouped.shape[-1], z).T / self.temperature
        return entropies(
            logits.flatten(0, -2)[:, None] if self.shared_histogram else logits, self.entropy_guard
        )

    def forward(self, z: Tensor) -> QuantizerOutput:
        with autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            tokens = self.encode(z)
            codes = self.decode(tokens).to(z.dtype)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, codes)}
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self.entropies(z).loss(self.diversity)
            # z + (c - z) is c up to rounding; outside of training it is c exactly.
            passed = z + (codes - z).detach() if self.training else codes
            return QuantizerOutput(passed, tokens, losses)
