"""The loss of tokenizer training: pixels, LPIPS, PatchGAN, and whatever the tokenizer itself names.

total = reconstruction + perceptual + w(step) * adaptive * adversarial + auxiliary losses (VQGAN, arXiv 2012.09841;
LlamaGen, arXiv 2406.06525: w = 0.5 from step 20,000, no adaptive weight).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.adversarial import (
    DiscriminatorKind,
    Kind,
    adaptive_weight,
    discriminator_adversarial,
    generator_adversarial,
)
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.reconstruction import Reconstruction


class LossTerms(NamedTuple):
    """The loss to minimise and what it is made of (for logs)."""

    total: Tensor
    terms: dict[str, Tensor]


class TokenizerLoss(nn.Module):
    """Weighted losses of both sides.

    `perceptual` is any module giving distances [B] or [B, 1, 1, 1] of (images, reconstruction); `discriminator` gives
    logits of images, `lecam` regularises it. `discriminator_weight` weighs the discriminator's own loss: None is the
    adversarial weight, as in LlamaGen's and Hita's training; 1 in TiTok's and ResTok's. A second, shorter
    reconstruction adds its own pixel and perceptual losses. Raises UserError for a negative start step.
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
        adaptive: bool = False,
        lecam: LeCam | None = None,
        discriminator_weight: float | None = None,
    ) -> None:
        super().__init__()
        if adversarial_start < 0:
            raise UserError(f"adversarial_start is {adversarial_start}; it is a step, at least 0")
        self.reconstruction, self.perceptual, self.perceptual_weight = reconstruction, perceptual, perceptual_weight
        self.discriminator, self.adversarial_weight = discriminator, adversarial_weight
        self.adversarial_start, self.adaptive, self.lecam = adversarial_start, adaptive, lecam
        self.discriminator_weight = adversarial_weight if discriminator_weight is None else discriminator_weight
        self.adversarial_kind: Kind = adversarial_kind
        self.discriminator_kind: DiscriminatorKind = discriminator_kind

    def weight_at(self, step: int) -> float:
        """Weight of the tokenizer's adversarial loss at an update."""
        return self.adversarial_weight if self.adversarial_active(step) else 0.0

    def adversarial_active(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.adversarial_start

    def adversarial(self, fake: Tensor) -> Tensor:
        """The tokenizer's adversarial loss, of logits on its reconstructions."""
        return generator_adversarial(fake, self.adversarial_kind)

    def discrimination(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, of its logits on images and on reconstructions."""
        return discriminator_adversarial(real, fake, self.discriminator_kind)

    def generator_loss(self, images: Tensor, output: TokenizerOutput, step: int, last_layer: Tensor) -> LossTerms:
        """Loss of the tokenizer at update `step`."""
        nll, terms = self._likeness(images, output.reconstruction)
        if output.shorter is not None:
            likeness, others = self._likeness(images, output.shorter)
            nll = nll + likeness
            terms |= {f"shorter_{name}": value for name, value in others.items()}
        total = nll
        if self.adversarial_active(step):
            assert self.discriminator is not None
            with frozen(self.discriminator):
                adversarial = self.adversarial(self.discriminator(output.reconstruction))
            scale = adaptive_weight(nll, adversarial, last_layer) if self.adaptive else torch.ones_like(nll)
            total = total + self.weight_at(step) * scale * adversarial
            terms |= {"adversarial": adversarial, "adaptive_weight": scale}
        for name, value in output.losses.items():
            terms[name] = value
            total = total + value
        return LossTerms(total, terms)

    def _likeness(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of pixel and perceptual losses, and the terms."""
        terms = self.reconstruction(images, reconstruction)
        total = self.reconstruction.weighted(terms)
        if self.perceptual is not None and self.perceptual_weight:
            terms["perceptual"] = self.perceptual(images, reconstruction).mean()
            total = total + self.perceptual_weight * terms["perceptual"]
        return total, terms

    def discriminator_loss(self, images: Tensor, reconstruction: Tensor, step: int) -> LossTerms:
        """Loss of the discriminator; 0 before the start step."""
        assert self.discriminator is not None
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        loss = self.discrimination(real, fake)
        terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + terms["lecam"]
        terms["discriminator"] = loss
        return LossTerms((self.discriminator_weight if self.adversarial_active(step) else 0.0) * loss, terms)


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
