"""Replays of VAR's multi-scale tokenizer (cases `vae` and `vq_train` of system `var`)."""

import torch

from tessellar.interop.options import require
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.var.official import vqvae_from_official
from tessellar.tokenizers.var.tokenizer import VARVQVAE

READ = (
    "vocab_size z_channels ch v_patch_nums share_quant_resi default_qresi_counts quant_conv_ks quant_resi using_znorm "
    "beta dropout encoder_decoder_override"
).split()


def recorded_vqvae(recording: Recording) -> VARVQVAE:
    """Our tokenizer with the recorded weights."""
    config = recording.options("vae", READ, {"test_mode": True})
    attention = {"using_sa": True, "using_mid_sa": True}
    require(config.get("encoder_decoder_override", {}), "the config's vae", attention)
    settings = recording.case_settings.get("vq_train", {})
    return vqvae_from_official(
        recording.state("vae."),
        tuple(config["v_patch_nums"]),
        phi_ratio=config.get("quant_resi", 0.5),
        commitment_weight=config.get("beta", settings.get("beta", 0.25)),
        cosine=config.get("using_znorm", settings.get("using_znorm", False)),
        dropout=config.get("dropout", 0.0),
    )


@replays("var", "vae")
def tokenizer(recording: Recording) -> Outputs:
    """Latents, tokens, sums of scales, images."""
    vqvae = recorded_vqvae(recording)
    images = recording.inputs["image"]
    tokens = vqvae.encode(images)
    sides = vqvae.quantizer.sides
    return {
        "vae.f": as_map(vqvae.latents(images), sides[-1]),
        "vae.idx": tokens,
        "vae.fhat": torch.stack(list(vqvae.quantizer.sums(tokens))),
        "vae.rec": vqvae(images).reconstruction.clamp(-1, 1),
        "vae.idx_to_img": vqvae.decode(tokens).clamp(-1, 1),
        "vae.var_input": vqvae.next_inputs(tokens, len(sides)),
    }


@replays("var", "vq_train", gradients=True)
def quantizer(recording: Recording) -> Outputs:
    """A training pass of the quantizer, and gradients of its loss and through it."""
    vqvae = recorded_vqvae(recording)
    quantizer = vqvae.quantizer
    side = quantizer.sides[-1]
    # Two gradients of one pass: through the straight-through estimate, and of the losses.
    latents = vqvae.latents(recording.inputs["image"]).detach().requires_grad_()
    output = quantizer(latents)
    cotangent = as_vectors(recording.inputs["vq_train.cot"])
    loss = output.losses["codebook"] + output.losses["commitment"]
    (through,) = torch.autograd.grad(
        (output.quantized * cotangent).sum(), latents, retain_graph=True
    )
    wanted = [latents, quantizer.codebook.weight, quantizer.phis[0].weight]
    of_latents, of_codebook, of_phi = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
    return {
        "vq_train.fhat": as_map(output.quantized.detach(), side),
        "vq_train.loss": loss.detach()[None],
        "vq_train.grad_from_cot": as_map(through, side),
        "vq_train.grad_f_from_loss": as_map(of_latents, side),
        "vq_train.grad_codebook_from_loss": of_codebook,
        "vq_train.grad_phi0_weight_from_loss": of_phi,
    }
