"""Multi-scale residual quantization: one codebook, maps from coarse to fine that add up (VAR, arXiv
2404.02905).

At each scale the rest is averaged down to p x p, quantized, resized up and passed through a
residual convolution phi; the sum of those maps is the quantized latent. z and the result are [B, h
w, C] in raster order of the finest scale, tokens [B, sum p^2] scale by scale. Different from the
official code: codes may be initialised from data and restarted.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Segment
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


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


class MultiScaleQuantizer(VectorQuantizer):
    """Scales of `sides`, the last that of the latent grid; `phis` convolutions are shared among
    them (0: one each).

    With `phi_ratio` 0 there are no convolutions. `cosine` compares directions instead of distances.
    The other options are those of VectorQuantizer, whose codes are not normalised here. Raises
    ValueError for sides that do not grow.
    """

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
        if not sides or any(a >= b for a, b in pairwise((0, *sides))):
            raise ValueError(f"scales {tuple(sides)} must grow from at least 1")
        self.sides = tuple(sides)
        self.cosine = cosine
        self.which = phi_of_scale(len(sides), phis or len(sides))
        made = (
            Phi(dim, phi_ratio) if phi_ratio else nn.Identity() for _ in range(phis or len(sides))
        )
        self.phis = nn.ModuleList(made)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One grid a scale."""
        return tuple(Segment((side, side), self.kind, f"scale{side}") for side in self.sides)

    def _nearest(self, z: Tensor) -> Tensor:
        if self.cosine:
            return (F.normalize(z, dim=-1) @ F.normalize(self.codebook.weight, dim=-1).T).argmax(-1)
        return self.distances(z).argmin(-1)

    def _map(self, scale: int, tokens: Tensor) -> Tensor:
        """What a scale's tokens [B, p p] add to the latent [B, C, h, w]."""
        side = self.sides[scale]
        finest = self.sides[-1]
        h = rearrange(self.codebook(tokens), "b (h w) c -> b c h w", h=side).contiguous()
        if side != finest:
            h = F.interpolate(h, (finest, finest), mode="bicubic")
        return self.phis[self.which[scale]](h)

    def scan(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scale by scale: averaged rests [B, p p, C], their tokens [B, p p], and the map [B, C, h,
        w] of those.
        """
        rest = rearrange(z.detach(), "b (h w) c -> b c h w", h=self.sides[-1]).contiguous()
        for scale, side in enumerate(self.sides):
            # Averaged down, so that a token says what its whole cell lacks.
            small = (
                rest if side == self.sides[-1] else F.interpolate(rest, (side, side), mode="area")
            )
            latents = rearrange(small, "b c h w -> b (h w) c")
            tokens = self._nearest(latents)
            added = self._map(scale, tokens)
            # The rest is a target for the next scales: no gradient runs along it.
            rest = rest - added.detach()
            yield latents, tokens, added

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([tokens for _, tokens, _ in self.scan(at_least_float32(z))], 1)

    def sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """Latents [B, C, h, w] summed over the first 1, 2, .. scales that `tokens` [B, n] cover."""
        total = None
        start = 0
        for scale, side in enumerate(self.sides):
            if start + side**2 > tokens.shape[1]:
                return
            added = self._map(scale, tokens[:, start : start + side**2])
            total = added if total is None else total + added
            start += side**2
            yield total

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.codebook.weight.device.type, enabled=False):
            *_, total = self.sums(tokens)
        return rearrange(total, "b c h w -> b (h w) c")

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1: the sum of all coarser maps, averaged down to
        the scale.
        """
        with torch.autocast(self.codebook.weight.device.type, enabled=False):
            known = sum(side**2 for side in self.sides[: count - 1])
            inputs = []
            sums = self.sums(tokens[:, :known])
            for side, total in zip(self.sides[1:count], sums, strict=True):
                small = F.interpolate(total, (side, side), mode="area")
                inputs.append(rearrange(small, "b c h w -> b (h w) c"))
        return torch.cat(inputs, 1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            finite = distributed.all_finite(z.detach()) if self.training else None
            if finite is not None:
                # Codes from data, of the rests of all scales, before any is quantized with them.
                latents = z
                if self.init_step is not None or self.restart_every is not None:
                    with torch.no_grad():
                        latents = torch.cat([rest for rest, _, _ in self.scan(z)], 1)
                self._maintain(latents, finite)
            found = []
            total = torch.zeros_like(z)
            # Squared errors that move the codes, and those that move z, by scale.
            to_codes = []
            to_latents = []
            for _, tokens, added in self.scan(z):
                total = total + rearrange(added, "b c h w -> b (h w) c")
                found.append(tokens)
                to_codes.append(F.mse_loss(total, z.detach()))
                to_latents.append(F.mse_loss(z, total.detach()))
            tokens = torch.cat(found, 1)
            if finite is not None and self.restart_every is not None:
                used = tokens.flatten().bincount(minlength=len(self.counts))
                self.counts += distributed.all_reduce_sum(used) * finite
            losses = {
                "codebook": self.codebook_weight * torch.stack(to_codes).mean(),
                "commitment": self.commitment_weight * torch.stack(to_latents).mean(),
            }
            return QuantizerOutput(z + (total - z).detach(), tokens, losses)
