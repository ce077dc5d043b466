"""Multi-scale residual quantization: one codebook, maps from coarse to fine that add up (VAR, arXiv
2404.02905).

At each scale the rest is averaged down to p x p, quantized, resized up and passed through a
residual convolution phi; the sum of those maps is the quantized latent. z and the result are [B, h
w, C] in raster order of the finest scale, tokens [B, sum p^2] scale by scale. Different from the
official code: codes may be initialised from data and restarted.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.protocol.arguments import COUNTS
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.pyramid import PyramidVQ, enlarged, rows


class Phi(nn.Conv2d):
    """(1 - r) h + r conv(h): a convolution that is only partly applied."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


def phi_of_scale(scales: int, count: int) -> list[int]:
    """Which of `count` phis each scale takes: the nearest tick. The official float64 expression
    decides the ties.
    """
    ends = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(ends, 1 - ends, count)
    return [int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales)]


class MultiScaleQuantizer(PyramidVQ):
    """Scales of `sides`, the last that of the latent grid; `phis` convolutions are shared among
    them (0: one each).

    With `phi_ratio` 0 there are no convolutions. `cosine` compares directions instead of distances.
    The other options are those of VectorQuantizer, whose codes are not normalised here. Raises
    ValueError for sides that do not grow.
    """

    ranges: ClassVar = {"phis": COUNTS}

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        sides: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phis: int = 4,
        phi_ratio: float = 0.5,
        cosine: bool = False,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        init_step: int | None = None,
        restart_every: int | None = None,
        restart_until: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            l2_normalize=False,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            init_step=init_step,
            restart_every=restart_every,
            restart_until=restart_until,
        )
        self.set_sides(sides)
        self.cosine = cosine
        self.which = phi_of_scale(len(sides), phis or len(sides))
        made = (
            Phi(dim, phi_ratio) if phi_ratio else nn.Identity() for _ in range(phis or len(sides))
        )
        self.phis = nn.ModuleList(made)

    def nearest(self, z: Tensor) -> Tensor:
        if self.cosine:
            return (F.normalize(z, dim=-1) @ F.normalize(self.codebook.weight, dim=-1).T).argmax(-1)
        return self.distances(z).argmin(-1)

    def added(self, scale: int, tokens: Tensor) -> Tensor:
        h = enlarged(self.codebook(tokens), self.sides[-1])
        return self.phis[self.which[scale]](h)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        found = []
        total = torch.zeros_like(z)
        # Squared errors that move the codes, and those that move z, by scale.
        to_codes = []
        to_latents = []
        for _, tokens, added in self.scan(z.detach()):
            total = total + rows(added)
            found.append(tokens)
            to_codes.append(F.mse_loss(total, z.detach()))
            to_latents.append(F.mse_loss(z, total.detach()))
        losses = {
            "codebook": self.codebook_weight * torch.stack(to_codes).mean(),
            "commitment": self.commitment_weight * torch.stack(to_latents).mean(),
        }
        return QuantizerOutput(z + (total - z).detach(), torch.cat(found, 1), losses)
