"""Replay of Hita's tokenizer (cases `tok_*` of recordings of system `hita`).

Features of the vision model are an input; where its weights are recorded they are computed as well and must agree.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.parity.recording import Recording
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.hita.official import from_official, vision_from_official
from tessellar.tokenizers.hita.tokenizer import Hita
from tessellar.tokenizers.hita.vision import HitaVision
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss

STRIDE = 7  # of the rows and columns of resized images that are recorded


def tokenizer(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases of the tokenizer."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    return outputs


def recorded_tokenizer(recording: Recording) -> Hita:
    """Our tokenizer with the recorded weights and, where they are recorded, those of the vision model."""
    config = recording.config["tokenizer"]
    transformers = config["encoder_decoder_transformers"]
    options = {
        "l2_normalize": config["l2_norm"],
        "commitment_weight": config["commit_loss_beta"],
        "entropy_weight": config["entropy_loss_ratio"],
    }
    return from_official(
        recording.weights["tokenizer"],
        config["image_size"],
        transformers["num_head"],
        transformers["shift_k"],
        _vision(recording),
        options,
    )


def _vision(recording: Recording) -> HitaVision:
    config = recording.config["vfm"]
    sizes = {name: config[name] for name in ("embed_dim", "depth", "num_heads")}
    return vision_from_official(recording.weights["backbone"], **sizes)


@torch.no_grad()
def _prepared(recording: Recording) -> dict[str, Tensor]:
    vision, side = _vision(recording), 336
    i, j = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    wave = torch.stack([torch.sin(0.9 * i + c) * torch.cos(1.1 * j - 0.5 * c) for c in range(3)])[None].float()
    return {
        "dino_input_stride7": vision.prepare(recording.inputs["image"])[..., ::STRIDE, ::STRIDE],
        "prep336_out_stride7": vision.prepare(wave)[..., ::STRIDE, ::STRIDE],
    }


def _features(recording: Recording, made: Hita) -> Tensor:
    """The recorded features; raises UserError where our vision model computes others."""
    recorded = recording.inputs["dino_features"]
    error = float((made.read_vision(recording.inputs["image"]) - recorded).abs().max())
    if error > 1e-3:
        raise UserError(f"the vision model's features differ from the recorded ones by {error:.1e}")
    return recorded


@torch.no_grad()
def _main(recording: Recording) -> dict[str, Tensor]:
    made, images = recorded_tokenizer(recording), recording.inputs["image"]
    vision = _features(recording, made)
    side = made.layout.segments[1].shape[0]
    cnn = made.cnn_encoder(images)
    slots, patches = made.encoder(rearrange(cnn, "b c h w -> b (h w) c"), vision)
    holistic, latents = made.latents(images, vision)
    quantized = made.holistic_quantizer(holistic), made.quantizer(latents)
    tokens = torch.cat([part.tokens for part in quantized], 1)
    codes = made.holistic_quantizer.decode(quantized[0].tokens), made.quantizer.decode(quantized[1].tokens)

    def maps(x: Tensor) -> Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=side)

    return {
        "cnn_features": cnn,
        "enc_patch": maps(patches),
        "enc_slots": slots,
        "z_pre": maps(latents),
        "q_pre": holistic,
        "z_indices": quantized[1].tokens.flatten(),
        "q_indices": quantized[0].tokens.flatten(),
        "z_quant_ste": maps(quantized[1].quantized),
        "q_quant_ste": quantized[0].quantized,
        "recon": made.decode(tokens),
        "vfm_recon": made.predict_vision(codes[0]),
        "fused": maps(made.fuse(*codes)),
        "recon_swapped_holistic": made.swap_holistic(tokens, tokens.flip(0)),
    }


class Given(nn.Module):
    """A perceptual distance as recorded."""

    def __init__(self, distance: Tensor) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.distance


class BothSides(nn.Module):
    """A discriminator that gives the recorded logits of whichever image it is shown."""

    def __init__(self, images: Tensor, real: Tensor, fake: Tensor) -> None:
        super().__init__()
        self.images, self.real, self.fake = images, real, fake

    def forward(self, images: Tensor) -> Tensor:
        return self.real if images is self.images else self.fake


@torch.no_grad()
def _losses(recording: Recording) -> dict[str, Tensor]:
    made, images, config = recorded_tokenizer(recording), recording.inputs["image"], recording.config["loss"]
    vision = _features(recording, made)
    output = made.forward_with(images, vision)
    holistic, latents = made.latents(images, vision)
    patch = made.quantizer(latents).losses
    discriminator = BothSides(images, recording.inputs["disc_logits_real"], recording.inputs["disc_logits_fake"])
    loss = TokenizerLoss(
        Reconstruction(l1=0.0, l2=2 * config["rec_weight"]),  # the official "l2" adds the squared error twice
        Given(recording.inputs["lpips_value"]),
        config["perceptual_weight"],
        discriminator,
        config["disc_weight"],
        config["disc_start"],
        "non_saturating",
        config["disc_loss"],
    )
    start = config["disc_start"]
    return {
        "loss_vq": output.losses["codebook"],
        "loss_commit": output.losses["commitment"],
        "loss_entropy": output.losses["entropy"],
        "loss_vq_patch": patch["codebook"],
        "loss_entropy_patch": patch["entropy"],
        "loss_sim": output.losses["vision"],
        "loss_gen_before_start": _total(loss, images, output, start - 1, made),
        "loss_gen_after_start": _total(loss, images, output, start, made),
        "loss_disc_after_start": loss.discriminator_loss(images, output.reconstruction, start).total,
    }


def _total(loss: TokenizerLoss, images: Tensor, output: TokenizerOutput, step: int, made: Hita) -> Tensor:
    return loss.generator_loss(images, output, step, made.last_layer).total


CASES: dict[str, Any] = {"tok_prep": _prepared, "tok_main": _main, "tok_loss": _losses}
