"""Clustering VQ (CVQ-VAE, arXiv 2307.15139): codes drift to latents, the faster the less they are
used.

As TA-TiTok's repository has it (arXiv 2501.07730): the share of each code in the batches of all
processes is averaged, and code k moves to the latent nearest to it by exp(-share_k V 10 / 0.01 -
1e-3), after the pass has used it.
"""

import torch
from torch import Tensor

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


class ClusteringVQ(VectorQuantizer):
    """As VectorQuantizer; `decay` is of the average share. Restarts are not needed."""

    shares: Tensor  # running share of each code, [V]

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalize: bool = False,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        rotation: bool = False,
    ) -> None:
        super().__init__(
            vocab_size, dim, l2_normalize, codebook_weight, commitment_weight, rotation=rotation
        )
        self.decay = decay
        tag(self.codebook.weight, "written")
        self.register_buffer("shares", torch.zeros(vocab_size))

    def forward(self, z: Tensor) -> QuantizerOutput:
        output = super().forward(z)
        if self.training:
            self.drift(z.detach(), output.tokens)
        return output

    @torch.no_grad()
    def drift(self, z: Tensor, tokens: Tensor) -> None:
        """Move codes to latents of a training pass, z [..., C] with its tokens, all processes together."""
        used = tokens.flatten().bincount(minlength=len(self.shares)).to(self.shares.dtype)
        used = distributed.all_reduce_sum(used)
        latents = distributed.gather_rows(at_least_float32(z).flatten(0, -2))
        finite = torch.isfinite(latents).all()
        # alpha_k = exp(-p_k V 10 / 0.01 - 1e-3), p_k the running share of code k: about 1 for a code
        # that nobody uses, 0 for one of average use.
        shares = self.shares.lerp(used / used.sum(), 1 - self.decay)
        speed = torch.exp(-shares * len(shares) * 10 / 0.01 - 1e-3)[:, None]
        with torch.autocast(latents.device.type, enabled=False):
            # The latent nearest to each code [V, C], as it came (not normalised).
            nearest = latents[self.distances(self._normalize(latents)).argmin(0)]
        codes = self.codebook.weight.lerp(nearest.to(self.codebook.weight.dtype), speed)
        # A pass that is not finite changes nothing: its NaN would be the nearest latent of every
        # code.
        self.shares.copy_(torch.where(finite, shares, self.shares))
        self.codebook.weight.copy_(torch.where(finite, codes, self.codebook.weight))
