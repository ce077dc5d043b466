"""Replay of what the official LlamaGen tokenizer, discriminator and losses gave (recordings of system `llamagen`).

Everything is read from the recording: sizes and options from its config, the step of a loss from its meaning.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.parity.recording import Recording, numbers
from tessellar.tokenizers.llamagen.official import discriminator_from_official, load_official, tokenizer_from_config
from tessellar.tokenizers.llamagen.tokenizer import LlamaGenVQ
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

MOMENTS = ("before_start", "after_start")


def vq(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases of the tokenizer, the discriminator and their losses."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    return outputs


def _tokenizer(recording: Recording) -> LlamaGenVQ:
    height, width = recording.inputs["vq/images"].shape[-2:]
    made = tokenizer_from_config(recording.config["vq"], (height, width))
    return load_official(made, recording.weights["vq"])


def _discriminator(recording: Recording) -> PatchGAN:
    return discriminator_from_official(recording.config["disc"], recording.weights["discriminator"])


@torch.no_grad()
def _tokenizer_outputs(recording: Recording) -> dict[str, Tensor]:
    tokenizer, images, codes = _tokenizer(recording), recording.inputs["vq/images"], recording.inputs["vq/codes"]
    latents = tokenizer.latents(images)
    tokens = tokenizer.encode(images)
    quantized = tokenizer.quantizer.decode(tokens.view(latents.shape[:-1]))
    return {
        "vq/encoder_out": tokenizer.encoder(images),
        "vq/z_pre": rearrange(latents, "b h w c -> b c h w"),
        "vq/indices": tokens,
        "vq/quant": rearrange(quantized, "b h w c -> b c h w"),
        "vq/recon": tokenizer.decode(tokens),
        "vq/codes_image": tokenizer.decode(codes),
    }


@torch.no_grad()
def _without_normalisation(recording: Recording) -> dict[str, Tensor]:
    """The same latents and codebook, compared as they are."""
    tokenizer, images = _tokenizer(recording), recording.inputs["vq/images"]
    own = tokenizer.quantizer
    assert isinstance(own, VectorQuantizer)
    plain = VectorQuantizer(*own.codebook.weight.shape, l2_normalize=False).eval()
    plain.load_state_dict(own.state_dict())
    tokens = plain.encode(tokenizer.latents(images))
    quantized = rearrange(plain.decode(tokens), "b h w c -> b c h w")
    return {"vq/no_l2/indices": tokens.flatten(1), "vq/no_l2/quant": quantized}


@torch.no_grad()
def _training_losses(recording: Recording) -> dict[str, Tensor]:
    images = recording.inputs["vq/images"]
    output = _tokenizer(recording).train()(images)
    return {
        "vq/train/vq_loss": output.losses["codebook"],
        "vq/train/commit_loss": output.losses["commitment"],
        "vq/train/entropy_loss": output.losses.get("entropy", torch.zeros(())),
        "vq/train/mse": Reconstruction(l2=1.0)(images, output.reconstruction)["l2"],
    }


@torch.no_grad()
def _discriminator_outputs(recording: Recording) -> dict[str, Tensor]:
    discriminator, images = _discriminator(recording), recording.inputs["vq/images"]
    evaluated = discriminator.eval()(images)
    return {"disc/logits_eval": evaluated, "disc/logits_train": discriminator.train()(images)}


class Given(nn.Module):
    """A perceptual distance that was recorded instead of computed."""

    def __init__(self, distance: Tensor) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.distance


class OfficialLoss(TokenizerLoss):
    """With `non_saturating` as the official code has it: target and logit swapped, so that one half is constant."""

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
    weight = float(config.get("reconstruction_weight", 1.0))
    pixels = {"l1": Reconstruction(l1=weight, l2=0.0), "l2": Reconstruction(l2=weight)}[config["reconstruction"]]
    return OfficialLoss(
        pixels,
        perceptual,
        float(config.get("perceptual_weight", 1.0)),
        discriminator,
        float(config["disc_weight"]),
        int(config["disc_start"]),
        config["gen_loss"].replace("-", "_"),
        config["disc_loss"].replace("-", "_"),
        adaptive,
    )


class _Update:
    """One recorded update, from the stored weights.

    In float64: the entropy term's temperature of 0.01 amplifies rounding, so that float32 gradients differ between
    machines and numbers of threads by as much as the tolerance.
    """

    def __init__(self, recording: Recording, case: str, moment: str) -> None:
        self.step = int(numbers(recording.meanings[f"{case}/generator_{moment}"])["global_step"])
        self.images = recording.inputs["vq/images"].double()
        self.tokenizer = _tokenizer(recording).train().double()
        discriminator = _discriminator(recording).train().double()
        perceptual = Given(recording.inputs["vq/train/perceptual"].double())
        self.loss = loss_from_config(recording.config["loss"], discriminator, perceptual, case == "loss/adaptive")
        self.output = self.tokenizer(self.images)
        self.terms = self.loss.generator_loss(self.images, self.output, self.step, self.tokenizer.last_layer)

    def discriminator_loss(self, stored: PatchGAN) -> Tensor:
        """With batch statistics of its own: the stored discriminator takes the place of the one that was run."""
        self.loss.discriminator = stored.train().double()
        return self.loss.discriminator_loss(self.images, self.output.reconstruction, self.step).total


def _plain_losses(recording: Recording) -> dict[str, Tensor]:
    outputs = {}
    for moment in MOMENTS:
        update = _Update(recording, "loss/plain", moment)
        outputs[f"loss/plain/generator_{moment}"] = update.terms.total
        outputs[f"loss/plain/discriminator_{moment}"] = update.discriminator_loss(_discriminator(recording))
        if moment == "before_start":
            outputs |= _gradients(update)
    return outputs


def _gradients(update: _Update) -> dict[str, Tensor]:
    tokenizer, quantizer = update.tokenizer, update.tokenizer.quantizer
    assert isinstance(quantizer, VectorQuantizer)
    chosen = [tokenizer.quant_conv.weight, quantizer.codebook.weight]
    everything = [*chosen, *tokenizer.parameters()]
    gradients = torch.autograd.grad(update.terms.total, everything, materialize_grads=True)
    return {
        "loss/plain/grad_norm_before_start": nn.utils.get_total_norm(gradients[2:]),
        "loss/plain/grad_quant_conv": gradients[0],
        "loss/plain/grad_codebook": gradients[1],
    }


def _adaptive_losses(recording: Recording) -> dict[str, Tensor]:
    outputs = {}
    for moment in MOMENTS:
        update = _Update(recording, "loss/adaptive", moment)
        outputs[f"loss/adaptive/generator_{moment}"] = update.terms.total
        if moment == "after_start":
            outputs["loss/adaptive/weight"] = update.terms.terms["adaptive_weight"]
            outputs["loss/adaptive/gen_adv"] = update.terms.terms["adversarial"]
    return outputs


CASES = {
    "vq": _tokenizer_outputs,
    "vq_no_l2": _without_normalisation,
    "vq_train": _training_losses,
    "disc": _discriminator_outputs,
    "loss_plain": _plain_losses,
    "loss_adaptive": _adaptive_losses,
}
