"""Shared quantizer: one index into two codebooks, semantic and pixel, of residuals at several scales
(TokenFlow, arXiv 2412.03069).

Vectors are [semantic | pixel] in the last axis, and so are codes. Both parts are normalised on their
own, never the whole. Different from VAR's scales: no convolution behind a scale, codes of length 1
are added as they are, and gradients pass straight through at every scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.ranges import check_number
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.entropy import entropy_loss
from tessellar.tokenizers.quantizers.pyramid import PyramidVQ, enlarged, rows

SIDES = {
    14: (1, 2, 4, 6, 8, 10, 12, 14),
    16: (1, 2, 4, 6, 8, 10, 12, 14, 16),
    27: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
}
"""The published scales by the side of the finest."""


class SharedQuantizer(PyramidVQ):
    """Codes of `semantic_dim` + `pixel_dim` channels, and scales of `sides`.

    The index minimises |z_sem - s|^2 + pixel_weight |z_pix - p|^2 between vectors of length 1.
    `scale_dropout`: how likely a training pass skips one scale behind the first. The other options
    are VectorQuantizer's. Raises ValueError for sides that do not grow.
    """

    def __init__(
        self,
        vocab_size: int = 32_768,
        semantic_dim: int = 32,
        pixel_dim: int = 8,
        sides: Sequence[int] = SIDES[14],
        pixel_weight: float = 1.0,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        scale_dropout: float = 0.1,
        init_step: int | None = None,
        restart_every: int | None = None,
        restart_until: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            semantic_dim + pixel_dim,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            init_step=init_step,
            restart_every=restart_every,
            restart_until=restart_until,
        )
        check_number("scale_dropout", scale_dropout, least=0, most=1)
        self.set_sides(sides)
        self.semantic_dim = semantic_dim
        self.pixel_dim = pixel_dim
        self.pixel_weight = pixel_weight
        self.scale_dropout = scale_dropout
        with torch.no_grad():
            self.codebook.weight.copy_(self.codes())

    def split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic and pixel part of vectors [..., C]."""
        semantic, pixel = vectors.split((self.semantic_dim, self.pixel_dim), -1)
        return semantic, pixel

    def _normalize(self, x: Tensor) -> Tensor:
        semantic, pixel = self.split(at_least_float32(x))
        return torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], -1)

    def part_distances(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances [..., V] of normalised z [..., C] to every code, in both codebooks."""
        semantic, pixel = self.split(z)
        semantic_codes, pixel_codes = self.split(self.codes())
        return squared(semantic, semantic_codes), squared(pixel, pixel_codes)

    def distances(self, z: Tensor) -> Tensor:
        semantic, pixel = self.part_distances(z)
        return semantic + self.pixel_weight * pixel

    def nearest(self, z: Tensor) -> Tensor:
        return self.distances(self._normalize(z)).argmin(-1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Codes [..., C] of tokens, both parts of length 1."""
        return self._normalize(self.codebook(tokens))

    def added(self, scale: int, tokens: Tensor) -> Tensor:
        return enlarged(self.vectors(tokens), self.sides[-1])

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1, as TokenFlow's generator reads them.

        The map of all coarser codes is enlarged from scale to scale, and codes are added where they
        are: neither VAR's inputs nor what `decode` sums.
        """
        inputs = []
        with torch.autocast(self.codebook.weight.device.type, enabled=False):
            codes = self.vectors(tokens[:, : self.ends[count - 1]])
            total = enlarged(codes[:, : self.ends[1]], self.sides[0])
            for scale in range(1, count):
                side = self.sides[scale]
                total = F.interpolate(total, (side, side), mode="bicubic")
                inputs.append(rows(total))
                if scale < count - 1:
                    own = codes[:, self.ends[scale] : self.ends[scale + 1]]
                    total = total + enlarged(own, side)
        return torch.cat(inputs, 1)

    def draw_skipped(self) -> int | None:
        """The scale that this training pass skips, the same in all processes; mostly none."""
        if not self.training or not self.scale_dropout or len(self.sides) < 2:
            return None
        skipped = None
        if float(torch.rand(())) < self.scale_dropout:
            skipped = int(torch.randint(1, len(self.sides), ()))
        return distributed.broadcast(skipped)

    def quantize(self, z: Tensor, skipped: int | None = None) -> QuantizerOutput:
        """z [B, h w, C] without the `skipped` scale (None: the one that this pass draws), and losses
        as means over the others: a skipped scale has tokens, but adds nothing.
        """
        if skipped is None:
            skipped = self.draw_skipped()
        total = torch.zeros(())
        found = []
        losses: dict[str, list[Tensor]] = {"codebook": [], "commitment": []}
        for scale, (rest, tokens, _) in enumerate(self.scan(z, skipped)):
            found.append(tokens)
            if scale == skipped:
                continue
            latents = self._normalize(rest)
            codes = self.vectors(tokens)
            # Straight through: the value of the codes, the gradient of this scale's rest.
            passed = latents + (codes - latents).detach()
            total = total + enlarged(passed, self.sides[-1])
            losses["codebook"].append(self.codebook_weight * F.mse_loss(codes, latents.detach()))
            losses["commitment"].append(
                self.commitment_weight * F.mse_loss(latents, codes.detach())
            )
            if self.entropy_weight > 0:
                affinity = -self.distances(latents)
                entropy = self.entropy_weight * entropy_loss(affinity, self.entropy_temperature)
                losses.setdefault("entropy", []).append(entropy)
        means = {name: torch.stack(values).mean() for name, values in losses.items()}
        return QuantizerOutput(rows(total), torch.cat(found, 1), means)


def squared(vectors: Tensor, codes: Tensor) -> Tensor:
    """Squared distances [..., V] of vectors [..., C] to codes [V, C]."""
    lengths = vectors.square().sum(-1, keepdim=True) + codes.square().sum(-1)
    return lengths - 2 * vectors @ codes.T
