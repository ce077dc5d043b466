"""Gaussian bottleneck: the "quantizer" of a KL-regularised autoencoder (VAE, arXiv 1312.6114; LDM,
arXiv 2112.10752).

It turns moments [mean | log variance] into continuous tokens, so any encoder and decoder with a quantizer becomes a
VAE. Tokens are latents times `scale` = 1 / their standard deviation over the data (no shift of the mean, as MAR's
0.2325): generators expect unit variance. The scale is measured while training and stored with the weights.
`GaussianSpace` puts the same posterior before a quantizer of ids.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import Continuous
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput, Tokenizer

MEMORY = 200  # training passes that the measured scale averages over


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents; mean and log variance [..., C]."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Latents of standard normal noise [..., C]."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, I) in nats, of each latent value [..., C]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)


class GaussianBottleneck(Quantizer):
    """Moments [..., 2 dim] to latents of `dim` channels.

    `kl_weight` multiplies the mean KL of a latent value, in nats. LDM's 1e-6 is a weight on sums
    over pixels and latents: times (latent values / pixel values) it is the one here. `scale` fixes
    the scale instead of measuring it. Raises ValueError for a negative weight or a scale that is
    not positive.
    """

    def __init__(self, dim: int, kl_weight: float = 1e-6, scale: float | None = None) -> None:
        super().__init__()
        if kl_weight < 0 or dim < 1 or (scale is not None and scale <= 0):
            raise ValueError(
                f"dim {dim} and scale {scale} must be positive, kl_weight {kl_weight} at least 0"
            )
        self.kind = Continuous(dim)
        self.dim = dim
        self.kl_weight = kl_weight
        self.measures = scale is None
        self.register_buffer("scale", torch.tensor(1.0 if scale is None else scale))
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.scale: Tensor
        self.moments: Tensor  # running mean and mean square of sampled latents
        self.passes: Tensor

    @property
    def in_dim(self) -> int:
        return 2 * self.dim

    def posterior(self, moments: Tensor) -> Posterior:
        """Posterior of moments [..., 2 dim]; log variances are clamped to [-30, 20]."""
        mean, logvar = at_least_float32(moments).chunk(2, dim=-1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def forward(self, z: Tensor) -> QuantizerOutput:
        posterior = self.posterior(z)
        latents = posterior.mean
        if self.training:
            latents = posterior.sample(torch.randn_like(latents))
            self.measure(latents.detach())
        return QuantizerOutput(
            latents, latents * self.scale, {"kl": self.kl_weight * posterior.kl().mean()}
        )

    def encode(self, z: Tensor) -> Tensor:
        return self.posterior(z).mean * self.scale

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of a sample of the posterior."""
        posterior = self.posterior(z)
        noise = torch.randn(posterior.mean.shape, generator=generator, device=posterior.mean.device)
        return posterior.sample(noise) * self.scale

    def law(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., dim] of the tokens that `draw` gives."""
        posterior = self.posterior(z)
        return posterior.mean * self.scale, posterior.std * self.scale

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens / self.scale

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Follow mean and mean square of sampled latents, unless the scale is fixed."""
        if not self.measures:
            return
        now = torch.stack([latents.mean(), latents.square().mean()]).to(self.moments.dtype)
        finite = torch.isfinite(now).all()
        moments = followed(self.moments, self.passes, now)
        self.passes += finite
        self.moments.copy_(moments)
        self.scale.copy_(torch.where(finite, scale_of(moments), self.scale))

    def forget(self) -> None:
        """Tokens are latents."""
        self.scale.fill_(1.0)

    def normalise(self, moments: Tensor) -> None:
        """Tokens of variance 1, of the mean and the mean square [2, dim] of drawn latents."""
        self.scale.copy_(scale_of(moments.mean(1)))


class GaussianSpace(Quantizer):
    """Moments [..., 2 dim] to tokens of `inner`: it quantizes draws of their Gaussian, which the KL
    divergence pulls to N(0, I), and the mean outside of training (VAT, arXiv 2412.02202).

    `kl_weight` multiplies the mean KL of a latent value, in nats. Raises ValueError for an inner
    quantizer that reads anything but vectors of its own size.
    """

    def __init__(self, inner: Quantizer, kl_weight: float = 1e-3) -> None:
        super().__init__()
        if inner.in_dim != inner.dim or isinstance(inner.kind, Continuous):
            raise ValueError(f"{type(inner).__name__} does not quantize vectors to ids")
        self.bottleneck = GaussianBottleneck(inner.dim, kl_weight, scale=1.0)
        self.inner = inner
        self.kind = inner.kind
        self.dim = inner.dim
        self.has_neighbours = inner.has_neighbours

    def logits(self, z: Tensor) -> Tensor:
        return self.inner.logits(self.bottleneck.posterior(z).mean)

    @property
    def in_dim(self) -> int:
        return self.bottleneck.in_dim

    def forward(self, z: Tensor) -> QuantizerOutput:
        drawn = self.bottleneck(z)
        output = self.inner(drawn.quantized)
        return output._replace(losses=output.losses | drawn.losses)

    def encode(self, z: Tensor) -> Tensor:
        return self.inner.encode(self.bottleneck.posterior(z).mean)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.inner.decode(tokens)


def followed(moments: Tensor, passes: Tensor, now: Tensor) -> Tensor:
    """Running means [...] after `passes` of them and those of a further pass.

    A mean of all passes at first, then a running one over the last MEMORY of them. A pass that is
    not finite changes nothing: a NaN would stay.
    """
    moved = moments.lerp(now, (1 / (passes + 1).float()).clamp(min=1 / MEMORY))
    return torch.where(torch.isfinite(now).all(), moved, moments)


def scale_of(moments: Tensor) -> Tensor:
    """1 / standard deviation, of a mean and a mean square [2, ...]."""
    return (moments[1] - moments[0].square()).clamp(min=1e-12).rsqrt()


class Normalising(Protocol):
    """A quantizer of continuous latents whose tokens are scaled, and maybe shifted, by what was
    measured.
    """

    scale: Tensor

    def forget(self) -> None:
        """Tokens are latents."""
        ...

    def normalise(self, moments: Tensor) -> None:
        """Scale (and shift) by the mean and the mean square [2, dim] of latents."""
        ...


@torch.no_grad()
def measure_scale(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> float:
    """Measure anew on images [B, 3, H, W] what tokens are normalised by, and set it; the scale that
    it gives is the mean over channels, where each has its own.

    Raises UserError for a tokenizer without continuous latents, and where there are no images.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if not hasattr(quantizer, "normalise"):
        raise UserError(
            f"{type(tokenizer).__name__} has no continuous latents whose scale could be measured"
        )
    normalising = cast(Normalising, quantizer)
    normalising.forget()
    total = torch.zeros(2, 1, dtype=torch.float64)
    count = 0
    for number, images in enumerate(batches):
        generator = torch.Generator(images.device).manual_seed(number)
        latents = tokenizer.draw(images, generator).double().cpu().flatten(0, -2)
        total = total + torch.stack([latents.sum(0), latents.square().sum(0)])
        count += len(latents)
    if count == 0:
        raise UserError("there are no images to measure the scale of the latents on")
    normalising.normalise((total / count).to(normalising.scale))
    return float(normalising.scale.mean())
