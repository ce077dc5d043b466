"""LeCam regularisation of a discriminator (arXiv 2104.03310): its logits stay near the other side's
running mean.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.arguments import in_ranges


@in_ranges
class LeCam(nn.Module):
    """`weight` * (relu(real - mean of fakes)^2 + relu(mean of reals - fake)^2) of batch means, then
    their update.

    Different from the paper, as in TiTok's code: batch means instead of single logits, and a margin
    at zero.
    """

    means: Tensor  # running means of logits on real and on fake images

    def __init__(self, weight: float = 0.001, decay: float = 0.999) -> None:
        super().__init__()
        self.weight = weight
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Of logits on images and on reconstructions."""
        real = at_least_float32(real).mean()
        fake = at_least_float32(fake).mean()
        # Logits on images should not leave the mean of those on fakes upwards, nor the reverse.
        loss = F.relu(real - self.means[1]).square() + F.relu(self.means[0] - fake).square()
        now = distributed.mean_over_ranks(torch.stack([real, fake]).detach())
        means = self.means * self.decay + now.to(self.means.dtype) * (1 - self.decay)
        # A NaN would stay for ever.
        self.means = torch.where(torch.isfinite(now).all(), means, self.means)
        return self.weight * loss
