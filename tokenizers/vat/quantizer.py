"""Multi-scale residual quantization of a sequence (VAT, arXiv 2412.02202): one codebook, scales of
growing token counts that add up.

At each scale the rest is averaged down to n vectors, quantized and resized up; the sum is the
quantized latent. z and the result are [B, N, C] with N the finest count, tokens [B, sum n] scale by
scale. The paper publishes neither code nor how sequences are resized, nor whether scales share
their codes: averages and lines between neighbours here, one codebook, no convolution behind it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Segment
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def averaged(vectors: Tensor, count: int) -> Tensor:
    """Vectors [B, N, C] averaged down to [B, count, C]."""
    if count == vectors.shape[1]:
        return vectors
    sequence = rearrange(vectors, "b n c -> b c n")
    return rearrange(F.adaptive_avg_pool1d(sequence, count), "b c n -> b n c")


def enlarged(vectors: Tensor, count: int) -> Tensor:
    """Vectors [B, n, C] on the lines between neighbours, [B, count, C]."""
    if count == vectors.shape[1]:
        return vectors
    sequence = rearrange(vectors, "b n c -> b c n")
    return rearrange(F.interpolate(sequence, count, mode="linear"), "b c n -> b n c")


class SequenceScales(VectorQuantizer):
    """Scales of `lengths` tokens, the last of which is the number of latents.

    Codes start as draws of N(0, I), where the latents are pulled to. The other options are those of
    VectorQuantizer. Raises ValueError for lengths that shrink.
    """

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
            l2_normalize=False,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            init_step=init_step,
            restart_every=restart_every,
            restart_until=restart_until,
        )
        if not lengths or any(a > b for a, b in pairwise((1, *lengths))):
            raise ValueError(f"lengths {tuple(lengths)} must grow from at least 1, or stay")
        self.lengths = tuple(lengths)
        nn.init.normal_(self.codebook.weight)

    @property
    def length(self) -> int:
        """Number of latents."""
        return self.lengths[-1]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One sequence a scale."""
        return tuple(
            Segment((length,), self.kind, f"scale{number}")
            for number, length in enumerate(self.lengths)
        )

    def scan(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scale by scale: averaged rests [B, n, C], their tokens [B, n], and what those add [B, N, C]."""
        rest = z.detach()
        for count in self.lengths:
            # Averaged, so that a token says what all the latents that it stands for lack.
            latents = averaged(rest, count)
            tokens = self.distances(latents).argmin(-1)
            added = enlarged(self.codebook(tokens), self.length)
            # The rest is a target for the next scales: no gradient runs along it.
            rest = rest - added.detach()
            yield latents, tokens, added

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([tokens for _, tokens, _ in self.scan(at_least_float32(z))], 1)

    def sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """Latents [B, N, C] summed over the first 1, 2, .. scales that `tokens` [B, n] cover."""
        total = None
        start = 0
        for count in self.lengths:
            if start + count > tokens.shape[1]:
                return
            added = enlarged(self.codebook(tokens[:, start : start + count]), self.length)
            total = added if total is None else total + added
            start += count
            yield total

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            *_, total = self.sums(tokens)
        return total

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1: the sum of all coarser ones, averaged down to
        the scale.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            known = sum(self.lengths[: count - 1])
            sums = self.sums(tokens[:, :known])
            lengths = self.lengths[1:count]
            inputs = [averaged(total, n) for n, total in zip(lengths, sums, strict=True)]
        return torch.cat(inputs, 1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            finite = distributed.all_finite(z.detach()) if self.training else None
            if finite is not None:
                rests = z
                if self.init_step is not None or self.restart_every is not None:
                    # Codes are made of data: of the rests of all scales.
                    with torch.no_grad():
                        rests = torch.cat([rest for rest, _, _ in self.scan(z)], 1)
                self._maintain(rests, finite)
            found = []
            total = torch.zeros_like(z)
            # VAR's losses: errors of the sum so far, that move the codes and that move z.
            to_codes = []
            to_latents = []
            for _, tokens, added in self.scan(z):
                total = total + added
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
