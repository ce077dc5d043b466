"""Replay of ResTok's tokenizer (cases `tok_*` of recordings of system `restok`). Recorded images are in [0, 1]."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.parity.recording import Recording, numbers
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.adversarial import discriminator_adversarial
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.restok.official import from_official
from tessellar.tokenizers.restok.tokenizer import ResTok
from tessellar.tokenizers.restok.transformers import residual_pyramid


def restok(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    return outputs


def recorded_tokenizer(recording: Recording) -> ResTok:
    """Our tokenizer with the recorded weights."""
    config = recording.config
    model = config["vq_model"]
    return from_official(
        recording.weights["tokenizer"],
        config["crop_size"],
        (config["encoder"]["heads"], config["decoder"]["heads"]),
        model["num_min_tokens"],
        model["drop_prob"],
        config["is_legacy"],
        config["losses"]["cos_margin"],
        {
            "l2_normalize": model["use_l2_norm"],
            "commitment_weight": model["commitment_cost"],
            "entropy_weight": model["entropy_loss_ratio"],
        },
    )


def recorded_images(recording: Recording) -> Tensor:
    """The recorded images in [-1, 1]."""
    return 2 * recording.inputs["image"] - 1


@torch.no_grad()
def _main(recording: Recording) -> dict[str, Tensor]:
    made, images = recorded_tokenizer(recording), recorded_images(recording)
    encoder, features = made.encoder, made.features(images)
    kept: dict[int, Tensor] = {}
    for number, block in enumerate(encoder.blocks):
        keep_output(block, number, kept)
    first, last = [encoder.grid], [encoder.grid]
    for _ in encoder.merging:
        last = [(last[0][0], last[0][1] // 2), *last]
    sequence = encoder.sequence(features)
    encoded = encoder.run(sequence)
    latents = made.latents(encoded)
    quantized = made.quantizer(latents)
    tokens, codes = quantized.tokens, quantized.quantized
    prefix = made.layout.min_prefix or made.layout.length
    cells = made.decoder.features(codes)
    assert made.encoder_to_vision is not None
    return {
        "cnn_features": features,
        "latent_init": residual_pyramid(encoder.project(features), encoder.sizes),
        "enc_in": sequence,
        "enc_after_first_merge": kept[encoder.merging[0]],
        "enc_last": kept[len(encoder.blocks) - 1],
        "enc_mask_first": encoder.facts(first, images.device)[1][0, 0].to(torch.uint8),
        "enc_mask_last": encoder.facts(last, images.device)[1][0, 0].to(torch.uint8),
        "enc_latents_ln": encoded.latents,
        "z": rearrange(latents, "b n c -> b c 1 n"),
        "last_image_tokens": rearrange(encoded.coarsest, "b n c -> b c 1 n"),
        "indices": tokens[:, None],
        "z_q": rearrange(codes, "b n c -> b c 1 n"),
        "recon": (made.render(codes) + 1) / 2,
        "dec_vf_feat": rearrange(cells, "b (h w) c -> b c h w", h=made.decoder.grid[0]),
        f"recon_keep{prefix}": (made.decode(tokens[:, :prefix]) + 1) / 2,
        "recon_tokens": (made.decode(tokens) + 1) / 2,
        "enc_vf_proj": rearrange(made.encoder_to_vision(encoded.coarsest), "b n c -> b c 1 n"),
    }


def keep_output(block: nn.Module, number: int, kept: dict[int, Tensor]) -> None:
    """Have a block leave behind what it gives: its MLP is its last step."""
    run = block.mlp

    def keeping(x: Tensor) -> Tensor:
        kept[number] = run(x)  # type: ignore[operator]
        return kept[number]

    object.__setattr__(block, "mlp", keeping)


@torch.no_grad()
def _train(recording: Recording) -> dict[str, Tensor]:
    made, images, keep = recorded_tokenizer(recording), recorded_images(recording), recording.inputs["nested_keep"]
    codes = made.quantizer(made.latents(made.encoder(made.features(images)))).quantized
    assert made.decoder_to_vision is not None
    cells = made.decoder_to_vision(made.decoder.features(codes, keep))
    return {
        "nested_probs": torch.tensor(list(made.keeps.values()), dtype=torch.float64),
        "recon_train": (made.forward_with(images, keep).reconstruction + 1) / 2,
        "dec_vf_proj": rearrange(cells, "b (h w) c -> b c h w", h=made.decoder.grid[0]),
    }


class Given(nn.Module):
    """A perceptual distance, or a discriminator's logits, as recorded."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *images: Tensor) -> Tensor:
        return self.value


@torch.no_grad()
def _losses(recording: Recording) -> dict[str, Tensor]:
    made, images, given = recorded_tokenizer(recording), recorded_images(recording), recording.inputs
    config = recording.config["losses"]
    keep = given["nested_keep"] if "tok_train" in recording.cases else None
    encoded = made.encoder(made.features(images))
    quantized = made.quantizer(made.latents(encoded))
    terms, patches = quantized.losses, rearrange(given["aux_feature"], "b c h w -> b (h w) c")
    grid = (given["aux_feature"].shape[2], given["aux_feature"].shape[3])
    vision = made.vision_loss(encoded, quantized.quantized, keep, given["aux_cls"].flatten(1), patches, grid)
    output = TokenizerOutput(
        made.render(quantized.quantized, keep), quantized.tokens, {**terms, "vision": config["vf_weight"] * vision}
    )
    real, fake = given["disc_logits_real"], given["disc_logits_fake"]
    loss = TokenizerLoss(
        Reconstruction(l1=0.0, l2=0.25 * config["weights"]),  # a square of images in [0, 1]
        Given(given["lpips_value"]),
        1.0,
        Given(fake),
        config["discriminator_weight"],
        config["discriminator_start"],
    )
    before, after = (
        loss.generator_loss(images, output, config["discriminator_start"] + step, made.last_layer) for step in (-1, 0)
    )
    lecam = LeCam(config["lecam"])
    means = numbers(recording.meanings["loss_disc"])
    lecam.means = torch.tensor([means["real"], means["fake"]])
    discriminator = discriminator_adversarial(real, fake, "hinge") + lecam(real, fake)
    return {
        "loss_quantizer_loss": torch.stack(list(terms.values())).sum(),
        "loss_commitment_loss": terms["commitment"],
        "loss_codebook_loss": terms["codebook"],
        "loss_entropy_loss": terms["entropy"],
        "loss_total_before_start": before.total,
        "loss_total_after_start": after.total,
        "loss_vf": vision,
        "loss_rec": 0.25 * before.terms["l2"],
        "loss_disc": discriminator,
        "lecam_ema_real_after": lecam.means[:1],
        "lecam_ema_fake_after": lecam.means[1:],
    }


CASES: dict[str, Any] = {
    "tok_main": _main,
    "tok_train": _train,
    "tok_loss": _losses,
}
