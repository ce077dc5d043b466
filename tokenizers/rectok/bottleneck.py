"""A Gaussian bottleneck whose tokens have mean 0 and variance 1 in every channel (RecTok, arXiv
2512.13421; LightningDiT's latents).
"""

import torch
from torch import Tensor

from tessellar.protocol.tokenizer import QuantizerOutput
from tessellar.tokenizers.quantizers.gaussian import (
    GaussianBottleneck,
    Posterior,
    followed,
    scale_of,
)


class ChannelBottleneck(GaussianBottleneck):
    """Moments [..., 2 dim] to latents of `dim` channels; tokens are (z - center) * scale, channel by
    channel.

    Both are measured on posterior means while training, and stored with the weights; with
    `measured` False they stay 0 and 1. `kl_weight` multiplies the KL of an image, summed over its
    latents, in nats. Raises ValueError as GaussianBottleneck does.
    """

    def __init__(self, dim: int, kl_weight: float = 1e-6, measured: bool = True) -> None:
        super().__init__(dim, kl_weight, scale=None if measured else 1.0)
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("moments", torch.zeros(2, dim))
        self.center: Tensor

    def loss(self, posterior: Posterior) -> Tensor:
        """The weighted KL of an image, a mean over images."""
        return self.kl_weight * posterior.kl().flatten(1).sum(1).mean()

    def forward(self, z: Tensor) -> QuantizerOutput:
        posterior = self.posterior(z)
        latents = posterior.mean
        if self.training:
            latents = posterior.sample(torch.randn_like(latents))
            self.measure(posterior.mean.detach())
        return QuantizerOutput(latents, self.normalised(latents), {"kl": self.loss(posterior)})

    def normalised(self, z: Tensor) -> Tensor:
        """Tokens [..., C] of latents."""
        return (z - self.center) * self.scale

    def encode(self, z: Tensor) -> Tensor:
        return self.normalised(self.posterior(z).mean)

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        posterior = self.posterior(z)
        noise = torch.randn(posterior.mean.shape, generator=generator, device=posterior.mean.device)
        return self.normalised(posterior.sample(noise))

    def law(self, z: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.posterior(z)
        return self.normalised(posterior.mean), posterior.std * self.scale

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens / self.scale + self.center

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Follow mean and mean square [C] of posterior means [..., C], unless they are fixed."""
        if not self.measures:
            return
        rows = latents.flatten(0, -2).to(self.moments.dtype)
        now = torch.stack([rows.mean(0), rows.square().mean(0)])
        moments = followed(self.moments, self.passes, now)
        self.passes += torch.isfinite(now).all()
        self.moments.copy_(moments)
        measured = self.passes > 0
        self.center.copy_(torch.where(measured, moments[0], self.center))
        self.scale.copy_(torch.where(measured, scale_of(moments), self.scale))

    def forget(self) -> None:
        super().forget()
        self.center.fill_(0.0)

    def normalise(self, moments: Tensor) -> None:
        """Mean 0 and variance 1 in every channel, of the mean and the mean square [2, dim]."""
        self.center.copy_(moments[0])
        self.scale.copy_(scale_of(moments))
