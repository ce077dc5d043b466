"""Multi-scale residual quantization of a sequence (VAT, arXiv 2412.02202): VAR's quantizer over
sequences of growing token counts.

z and the result are [B, N, C] with N the finest length, tokens [B, sum n] scale by scale. The paper
publishes neither code nor how sequences are resized, nor whether scales share their codes: averages
and lines between neighbours here, one codebook, no convolution behind it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.protocol.arguments import SIZES
from tessellar.protocol.layout import Segment
from tessellar.tokenizers.var import MultiScaleQuantizer


class SequenceScales(MultiScaleQuantizer):
    """Scales of `lengths` tokens, the last of which is the number of latents.

    Codes start as draws of N(0, I), where the latents are pulled to. The other options are those of
    VectorQuantizer. Raises ValueError for lengths that shrink.
    """

    ranges: ClassVar = {"lengths": SIZES}  # where others say by a word how they are drawn

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        lengths: Sequence[int],
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        init_step: int | None = None,
        restart_every: int | None = None,
        restart_until: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            lengths,
            phis=1,
            phi_ratio=0.0,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            init_step=init_step,
            restart_every=restart_every,
            restart_until=restart_until,
        )
        nn.init.normal_(self.codebook.weight)

    def set_sides(self, sides: Sequence[int]) -> None:
        """Lengths may stay from one scale to the next."""
        if not sides or any(a > b for a, b in pairwise((1, *sides))):
            raise ValueError(f"lengths {tuple(sides)} must grow from at least 1, or stay")
        self.sides = tuple(sides)

    @property
    def length(self) -> int:
        """Number of latents."""
        return self.sides[-1]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((1, length) for length in self.sides)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One sequence a scale."""
        return tuple(
            Segment((length,), self.kind, f"scale{number}")
            for number, length in enumerate(self.sides)
        )

    def added(self, scale: int, tokens: Tensor) -> Tensor:
        row = rearrange(self.codebook(tokens), "b n c -> b c 1 n")
        if row.shape[-1] == self.length:
            return row
        return F.interpolate(row, self.shapes[-1], mode="bilinear")
