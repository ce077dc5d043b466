"""The loss of tokenizer training: pixels, LPIPS, a discriminator, and whatever the tokenizer itself
names.

total = reconstruction + perceptual + w(step) * adaptive * adversarial + auxiliary losses (VQGAN,
arXiv 2012.09841; LlamaGen, arXiv 2406.06525: w = 0.5 from step 20,000, no adaptive weight).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.adversarial import (
    AdaptiveWeight,
    DiscriminatorKind,
    Kind,
    discriminator_adversarial,
    generator_adversarial,
)
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.reconstruction import Reconstruction


class LossTerms(NamedTuple):
    """The loss to minimise and what it is made of (for logs)."""

    total: Tensor
    terms: dict[str, Tensor]


@in_ranges
@dataclass(frozen=True)
class Onset:
    """How the adversarial part comes in, in updates from its start: the tokenizer's weight rises
    linearly over `warmup`, and what the discriminator sees is blurred less and less over `blur`
    (StyleGAN-XL, arXiv 2202.00273).
    """

    warmup: int = 0
    blur: int = 0

    def __post_init__(self) -> None:
        if min(self.warmup, self.blur) < 0:
            raise ValueError(f"warmup {self.warmup} and blur {self.blur} count updates, at least 0")

    def share(self, update: int) -> float:
        """Share of the adversarial weight, so many updates after its start."""
        return min(1.0, update / self.warmup) if self.warmup else 1.0

    def blurred(self, images: Tensor, update: int) -> Tensor:
        """Images [B, 3, H, W] as the discriminator sees them, so many updates after its start."""
        left = 1 - update / self.blur if update < self.blur else 0.0
        return blur(images, left * math.sqrt(images.shape[-2] / 2))


@in_ranges
class TokenizerLoss(nn.Module):
    """Weighted losses of both sides.

    `perceptual` is any module giving distances [B] or [B, 1, 1, 1] of (images, reconstruction);
    `discriminator` gives logits of images, `lecam` regularises it. `discriminator_weight` weighs
    the discriminator's own loss: None is the adversarial weight, as in LlamaGen's and Hita's
    training; 1 in TiTok's and ResTok's. `adaptive` scales the adversarial weight by gradients
    (True: with VQGAN's bounds). `consistency` weighs the mean squared difference of the logits of
    two augmentations of the same images (bCR, arXiv 2002.04724), beside the discriminator's own
    loss. With `autocast` the networks of the loss run in the run's precision, as in LlamaGen's
    training; without, in float32, as in TiTok's and ResTok's. With `round_fakes` the discriminator's
    own loss sees reconstructions as 8-bit pictures (BAR's, RAE's). A second, shorter reconstruction
    adds its own pixel and perceptual losses. Raises UserError for a negative start step and for a
    consistency of a discriminator that augments nothing.
    """

    def __init__(
        self,
        reconstruction: Reconstruction = Reconstruction(),  # noqa: B008
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 20_000,
        adversarial_kind: Kind = "hinge",
        discriminator_kind: DiscriminatorKind = "hinge",
        adaptive: bool | AdaptiveWeight = False,
        lecam: LeCam | None = None,
        discriminator_weight: float | None = None,
        onset: Onset = Onset(),  # noqa: B008
        consistency: float = 0.0,
        autocast: bool = False,
        round_fakes: bool = False,
    ) -> None:
        super().__init__()
        if adversarial_start < 0:
            raise UserError(f"adversarial_start is {adversarial_start}; it is a step, at least 0")
        if consistency and getattr(discriminator, "augment", None) is None:
            raise UserError(
                "consistency compares two augmentations: give it a discriminator with `augment`, or 0"
            )
        self.reconstruction = reconstruction
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.lecam = lecam
        self.onset = onset
        self.adaptive = AdaptiveWeight() if adaptive is True else adaptive or None
        self.discriminator_weight = (
            adversarial_weight if discriminator_weight is None else discriminator_weight
        )
        self.consistency = consistency
        self.autocast = autocast
        self.round_fakes = round_fakes
        self.adversarial_kind: Kind = adversarial_kind
        self.discriminator_kind: DiscriminatorKind = discriminator_kind

    def weight_at(self, step: int) -> float:
        """Weight of the tokenizer's adversarial loss at an update."""
        if not self.adversarial_active(step):
            return 0.0
        return self.adversarial_weight * self.onset.share(step - self.adversarial_start)

    def adversarial_active(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.adversarial_start

    def adversarial(self, fake: Tensor) -> Tensor:
        """The tokenizer's adversarial loss, of logits on its reconstructions."""
        return generator_adversarial(fake, self.adversarial_kind)

    def discrimination(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, of its logits on images and on reconstructions."""
        return discriminator_adversarial(real, fake, self.discriminator_kind)

    def generator_loss(
        self, images: Tensor, output: TokenizerOutput, step: int, last_layer: Tensor
    ) -> LossTerms:
        """Loss of the tokenizer at update `step`."""
        with self._precision(images):
            nll, terms = self.likeness(images, output.reconstruction)
            if output.shorter is not None:
                likeness, others = self.likeness(images, output.shorter)
                nll = nll + likeness
                terms |= {f"shorter_{name}": value for name, value in others.items()}
            total = nll
            if self.adversarial_active(step):
                found = self.adversarial_terms(output.reconstruction, step, nll, last_layer)
                total = (
                    total + self.weight_at(step) * found["adaptive_weight"] * found["adversarial"]
                )
                terms |= found
        for name, value in output.losses.items():
            terms[name] = value
            total = total + value
        return LossTerms(total, terms)

    def adversarial_terms(
        self, fake: Tensor, step: int, nll: Tensor, last_layer: Tensor
    ) -> dict[str, Tensor]:
        assert self.discriminator is not None
        # Gradients go through the discriminator to the tokenizer, none into its own weights.
        with frozen(self.discriminator):
            adversarial = self.adversarial(self.discriminator(self._shown(fake, step)))
        if self.adaptive is None:
            scale = torch.ones_like(nll)
        else:
            scale = self.adaptive(nll, adversarial, last_layer, values=fake[0].numel())
        return {"adversarial": adversarial, "adaptive_weight": scale}

    def likeness(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of pixel and perceptual losses of images [B, 3, H, W], and the terms."""
        if not reconstruction.numel():
            self.require_no_image_loss()
            return images.new_zeros(()), {}
        terms = self.reconstruction(images, reconstruction)
        total = self.reconstruction.weighted(terms)
        if self.perceptual is not None and self.perceptual_weight:
            terms["perceptual"] = self.perceptual(images, at_least_float32(reconstruction)).mean()
            total = total + self.perceptual_weight * terms["perceptual"]
        return total, terms

    def require_no_image_loss(self) -> None:
        """For a training pass that draws no image; raises UserError where a loss would need one."""
        pixels = self.reconstruction.l1 or self.reconstruction.l2 or self.reconstruction.gradient
        if (
            pixels
            or (self.perceptual is not None and self.perceptual_weight)
            or self.discriminator is not None
        ):
            raise UserError(
                "this tokenizer draws no image in training (TiTok's first stage): set the pixel losses to 0 "
                "(`reconstruction: {l2: 0.0}`), and give no perceptual loss and no discriminator"
            )

    def discriminator_loss(self, images: Tensor, reconstruction: Tensor, step: int) -> LossTerms:
        """Loss of the discriminator; 0 before the start step."""
        assert self.discriminator is not None
        fakes = reconstruction.detach()
        if self.round_fakes:
            fakes = (at_least_float32(fakes).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
        with self._precision(images):
            real = self.discriminator(self._shown(images, step))
            fake = self.discriminator(self._shown(fakes, step))
            loss = self.discrimination(real, fake)
            terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
            if self.lecam is not None:
                terms["lecam"] = self.lecam(real, fake)
                loss = loss + terms["lecam"]
            if self.consistency:
                again = [self.discriminator(at_least_float32(shown)) for shown in (images, fakes)]
                terms["consistency"] = self.consistency * F.mse_loss(
                    torch.stack(again), torch.stack([real, fake])
                )
                loss = loss + terms["consistency"]
        terms["discriminator"] = loss
        return LossTerms(
            (self.discriminator_weight if self.adversarial_active(step) else 0.0) * loss, terms
        )

    def _shown(self, images: Tensor, step: int) -> Tensor:
        """What the discriminator is given of images, before its own augmentation."""
        return self.onset.blurred(at_least_float32(images), max(0, step - self.adversarial_start))

    def _precision(self, images: Tensor) -> AbstractContextManager:
        return nullcontext() if self.autocast else torch.autocast(images.device.type, enabled=False)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images convolved with 2^-(x / sigma)^2 along both sides; as they are where that is narrower
    than a pixel.
    """
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    line = torch.exp2(-(places / sigma).square())
    kernel = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own parameters inside; gradients still pass through it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
