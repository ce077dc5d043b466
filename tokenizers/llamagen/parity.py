"""Replays of LlamaGen's tokenizer, discriminator and losses (recordings of system `llamagen`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.interop.options import check_options
from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed, gradient_norm
from tessellar.tokenizers.llamagen.official import (
    discriminator_from_official,
    load_official,
    tokenizer_from_config,
)
from tessellar.tokenizers.llamagen.tokenizer import LlamaGenVQ
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

LOSS = (
    "disc_start disc_weight disc_loss gen_loss reconstruction reconstruction_weight perceptual_weight codebook_weight"
).split()


def _tokenizer(recording: Recording, **options: Any) -> LlamaGenVQ:
    """Our tokenizer with the recorded weights; `options` replace some of the config's."""
    height, width = recording.inputs["vq/images"].shape[-2:]
    made = tokenizer_from_config({**recording.config["vq"], **options}, (height, width))
    return load_official(made, recording.weights["vq"])


def _discriminator(recording: Recording) -> PatchGAN:
    return discriminator_from_official(recording.config["disc"], recording.weights["discriminator"])


@replays("llamagen", "shared", "vq")
def tokenizer(recording: Recording) -> Outputs:
    """Latents, tokens, and images of the tokens and of recorded ones."""
    tokenizer = _tokenizer(recording)
    images = recording.inputs["vq/images"]
    tokens = tokenizer.encode(images)
    return {
        "vq/encoder_out": tokenizer.encoder(images),
        "vq/z_pre": tokenizer.maps(images),
        "vq/indices": tokens,
        "vq/quant": as_map(tokenizer.quantizer.decode(tokens), tokenizer.grid[0]),
        "vq/recon": tokenizer.decode(tokens),
        "vq/codes_image": tokenizer.decode(recording.inputs["vq/codes"]),
    }


@replays("llamagen", "shared", "vq_no_l2")
def without_normalisation(recording: Recording) -> Outputs:
    """The same latents and codebook, compared as they are."""
    options = recording.settings("vq/no_l2/indices")
    tokenizer = _tokenizer(recording, codebook_l2_norm=options["codebook_l2_norm"])
    tokens = tokenizer.encode(recording.inputs["vq/images"])
    return {
        "vq/no_l2/indices": tokens,
        "vq/no_l2/quant": as_map(tokenizer.quantizer.decode(tokens), tokenizer.grid[0]),
    }


@replays("llamagen", "shared", "vq_train")
def training_losses(recording: Recording) -> Outputs:
    """Losses of the quantizer, and the squared error."""
    images = recording.inputs["vq/images"]
    output = _tokenizer(recording).train()(images)
    return {
        "vq/train/vq_loss": output.losses["codebook"],
        "vq/train/commit_loss": output.losses["commitment"],
        "vq/train/entropy_loss": output.losses.get("entropy", torch.zeros(())),
        "vq/train/mse": Reconstruction(l2=1.0)(images, output.reconstruction)["l2"],
    }


@replays("llamagen", "shared", "disc")
def discriminator(recording: Recording) -> Outputs:
    """Logits with running and with batch statistics."""
    outputs = {}
    for name in recording.names("output", {"disc"}):
        critic = _discriminator(recording).train(recording.settings(name)["training"])
        outputs[name] = critic(recording.inputs["vq/images"])
    return outputs


class OfficialLoss(TokenizerLoss):
    """With their `non_saturating`: target and logit swapped, so that one half is constant."""

    def adversarial(self, fake: Tensor) -> Tensor:
        if self.adversarial_kind == "hinge":
            return super().adversarial(fake)
        return F.binary_cross_entropy_with_logits(torch.ones_like(fake), fake)

    def discrimination(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.discriminator_kind != "non_saturating":
            return super().discrimination(real, fake)
        on_real = F.binary_cross_entropy_with_logits(torch.ones_like(real), real)
        return 0.5 * (on_real + F.binary_cross_entropy_with_logits(torch.zeros_like(fake), fake))


def loss_from_config(
    config: Mapping[str, Any], discriminator: nn.Module, perceptual: nn.Module, adaptive: bool
) -> OfficialLoss:
    """The loss of the official options. Their `codebook_weight` is read by nothing, here as there."""
    check_options(config, "the config's loss", LOSS)
    weight = float(config.get("reconstruction_weight", 1.0))
    pixels = {"l1": Reconstruction(l1=weight, l2=0.0), "l2": Reconstruction(l2=weight)}
    return OfficialLoss(
        pixels[config["reconstruction"]],
        perceptual,
        perceptual_weight=float(config.get("perceptual_weight", 1.0)),
        discriminator=discriminator,
        adversarial_weight=float(config["disc_weight"]),
        adversarial_start=int(config["disc_start"]),
        adversarial_kind=config["gen_loss"].replace("-", "_"),
        discriminator_kind=config["disc_loss"].replace("-", "_"),
        adaptive=adaptive,
    )


class _Update:
    """The update at which the tensor `name` was recorded, from the stored weights.

    In float64: the entropy term's temperature of 0.01 amplifies rounding, so that float32 gradients
    differ between machines and numbers of threads by as much as the tolerance.
    """

    def __init__(self, recording: Recording, name: str) -> None:
        settings = recording.settings(name)
        self.step = settings["global_step"]
        self.images = recording.inputs["vq/images"].double()
        self.tokenizer = _tokenizer(recording).train().double()
        discriminator = _discriminator(recording).train().double()
        perceptual = Fixed(recording.inputs["vq/train/perceptual"].double())
        adaptive = settings["disc_adaptive_weight"]
        self.loss = loss_from_config(
            recording.config["loss"], discriminator, perceptual, adaptive=adaptive
        )
        self.output = self.tokenizer(self.images)
        self.terms = self.loss.generator_loss(
            self.images, self.output, self.step, self.tokenizer.last_layer
        )

    def discriminator_loss(self, stored: PatchGAN) -> Tensor:
        """With batch statistics of its own: of the stored discriminator, not the one that was run."""
        self.loss.discriminator = stored.train().double()
        return self.loss.discriminator_loss(
            self.images, self.output.reconstruction, self.step
        ).total


@replays("llamagen", "shared", "loss_plain", gradients=True)
def plain_losses(recording: Recording) -> Outputs:
    """Losses of both sides before and after the discriminator starts, and gradients of one."""
    outputs = {}
    for name in recording.names("output", {"loss_plain"}):
        update = _Update(recording, name)
        settings = recording.settings(name)
        if "discriminator" in name:
            outputs[name] = update.discriminator_loss(_discriminator(recording))
        elif "grad_to" in settings:
            outputs[name] = gradient_to(update, settings["grad_to"])
        elif "grad_norm" in name:
            outputs[name] = gradient_norm(update.terms.total, update.tokenizer)
        else:
            outputs[name] = update.terms.total
    return outputs


def gradient_to(update: _Update, name: str) -> Tensor:
    """Of the total, with respect to a tensor of an official name."""
    quantizer = update.tokenizer.quantizer
    assert isinstance(quantizer, VectorQuantizer)
    wanted = {
        "quant_conv.weight": update.tokenizer.quant_conv.weight,
        "quantize.embedding.weight": quantizer.codebook.weight,
    }
    (gradient,) = torch.autograd.grad(update.terms.total, wanted[name], retain_graph=True)
    return gradient


@replays("llamagen", "shared", "loss_adaptive", gradients=True)
def adaptive_losses(recording: Recording) -> Outputs:
    """The total with an adversarial weight that follows the gradients, and that weight."""
    outputs = {}
    for name in recording.names("output", {"loss_adaptive"}):
        terms = _Update(recording, name).terms
        values = {
            "weight": terms.terms.get("adaptive_weight"),
            "gen_adv": terms.terms.get("adversarial"),
        }
        outputs[name] = values.get(name.rpartition("/")[2], terms.total)
    return outputs
