"""Multi-scale residual quantization by signs: bits from coarse to fine (Infinity, arXiv
2412.04431).

At each scale the rest is averaged down to p x p, its vectors are put on the unit sphere and
quantized to signs, and the codes are resized up linearly and taken off the rest. No phi, no
codebook. z is [B, h w, C] in raster order of the finest scale, tokens [B, sum p^2, C] bits scale by
scale. The released code has no losses; the commitment is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Bits
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.pyramid import PyramidQuantizer, enlarged


class MultiScaleBSQ(PyramidQuantizer):
    """Scales of `sides`, the last that of the latent grid. Raises ValueError for sides that do not
    grow.
    """

    def __init__(self, dim: int, sides: Sequence[int], commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.set_sides(sides)
        self.kind = Bits(dim)
        self.dim = dim
        self.commitment_weight = commitment_weight

    def nearest(self, z: Tensor) -> Tensor:
        return (z > 0).long()

    def added(self, scale: int, tokens: Tensor) -> Tensor:
        signs = (tokens.float() * 2 - 1) / self.dim**0.5
        return enlarged(signs, self.sides[-1], mode="bilinear")

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            tokens = self.encode(z)
            total = self.decode(tokens).to(z.dtype)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, total)}
            return QuantizerOutput(
                z + (total - z).detach() if self.training else total, tokens, losses
            )
