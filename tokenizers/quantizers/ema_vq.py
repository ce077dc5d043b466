"""Vector quantization whose codes are running means of their latents (VQ-VAE, arXiv 1711.00937,
appendix A.1).

After each training pass code = sum / count, both averaged with `decay` and the count smoothed;
numerics are those of vector-quantize-pytorch, except that gradients pass straight through unless
`rotation` is set. Codes whose count falls below `threshold` become random latents of the global
batch. No gradient reaches the codes, and no optimizer owns them. A pass whose latents are not
finite changes nothing: one NaN would stay in a running mean for ever.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.tags import tag
from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

SMOOTHING = 1e-5


class EMAVectorQuantizer(VectorQuantizer):
    """As VectorQuantizer; counts are per pass, so `threshold` means that many latents a pass (0:
    never restart).

    A restarted code counts as used `threshold` times, at least once. Raises ValueError for a decay
    outside [0, 1] and a negative threshold.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalize: bool = True,
        commitment_weight: float = 1.0,
        decay: float = 0.99,
        threshold: float = 0.0,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        init_step: int | None = None,
        rotation: bool = False,
    ) -> None:
        if not 0 <= decay <= 1 or threshold < 0:
            raise ValueError(
                f"decay {decay} must be in [0, 1] and threshold {threshold} at least 0"
            )
        super().__init__(
            vocab_size,
            dim,
            l2_normalize=l2_normalize,
            codebook_weight=0.0,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            init_step=init_step,
            rotation=rotation,
        )
        self.decay = decay
        self.threshold = threshold
        tag(self.codebook.weight.requires_grad_(False), "written")
        self.register_buffer("sizes", torch.ones(vocab_size))
        self.register_buffer("sums", self.codebook.weight.detach().clone())
        self.sizes: Tensor
        self.sums: Tensor

    def forward(self, z: Tensor) -> QuantizerOutput:
        output = super().forward(z)
        del output.losses["codebook"]
        if self.training:
            with torch.autocast(z.device.type, enabled=False):
                self.update(self._normalize(z.detach()), output.tokens)
        return output

    @torch.no_grad()
    def update(self, z: Tensor, tokens: Tensor) -> None:
        """Average what chose each code, of normalised latents z [B, ..., C]; codes follow."""
        rows = z.flatten(0, -2).to(self.sums.dtype)
        chosen = tokens.flatten()
        used = chosen.bincount(minlength=len(self.sizes)).to(self.sizes.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, rows)
        used = distributed.all_reduce_sum(used)
        sums = distributed.all_reduce_sum(sums)
        # Every latent of every rank is in one of the sums.
        finite = torch.isfinite(sums).all()
        self.sizes.copy_(torch.where(finite, self.sizes.lerp(used, 1 - self.decay), self.sizes))
        self.sums.copy_(torch.where(finite, self.sums.lerp(sums, 1 - self.decay), self.sums))
        # Codes are the mean of what chose them; smoothed counts keep unused codes from a zero.
        total = self.sizes.sum()
        smoothed = (self.sizes + SMOOTHING) / (total + len(self.sizes) * SMOOTHING) * total
        means = self.sums / smoothed[:, None]
        if self.l2_normalize:
            means = F.normalize(means, dim=-1)
        self.codebook.weight.copy_(torch.where(finite, means, self.codebook.weight))
        # Dead codes move to latents of this pass (Jukebox, arXiv 2005.00341).
        expired = self.expired() & finite
        if self.threshold > 0 and bool(expired.any()):
            self._replace(expired, z)

    def expired(self) -> Tensor:
        """Which codes are used less than the threshold, [V]."""
        return self.sizes < self.threshold

    def _replace(self, which: Tensor, z: Tensor) -> None:
        super()._replace(which, z)
        size = max(self.threshold, 1.0)
        self.sizes[which] = size
        self.sums[which] = self.codebook.weight[which].to(self.sums.dtype) * size
