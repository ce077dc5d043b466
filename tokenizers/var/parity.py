"""Replays of VAR's multi-scale tokenizer (cases `vae` and `vq_train` of recordings of system `var`)."""

import torch
from einops import rearrange
from torch import Tensor

from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import prefixed
from tessellar.tokenizers.var.official import vqvae_from_official
from tessellar.tokenizers.var.tokenizer import VARVQVAE


def recorded_vqvae(recording: Recording) -> VARVQVAE:
    """Our tokenizer with the recorded weights."""
    sides = tuple(recording.config["vae"]["v_patch_nums"])
    return vqvae_from_official(prefixed(recording.weights["model"], "vae."), sides)


def _maps(x: Tensor, side: int) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=side)


@replays("var", "vae")
@torch.no_grad()
def tokenizer(recording: Recording) -> dict[str, Tensor]:
    """Latents, tokens, sums of scales, images."""
    vqvae = recorded_vqvae(recording)
    images = recording.inputs["image"]
    tokens = vqvae.encode(images)
    sides = vqvae.quantizer.sides
    return {
        "vae.f": _maps(vqvae.latents(images), sides[-1]),
        "vae.idx": tokens,
        "vae.fhat": torch.stack(list(vqvae.quantizer.sums(tokens))),
        "vae.rec": vqvae(images).reconstruction.clamp(-1, 1),
        "vae.idx_to_img": vqvae.decode(tokens).clamp(-1, 1),
        "vae.var_input": vqvae.next_inputs(tokens, len(sides)),
    }


@replays("var", "vq_train")
def quantizer(recording: Recording) -> dict[str, Tensor]:
    """A training pass of the quantizer, and gradients of its loss and through it."""
    vqvae = recorded_vqvae(recording)
    quantizer = vqvae.quantizer
    side = quantizer.sides[-1]
    latents = vqvae.latents(recording.inputs["image"]).detach().requires_grad_()
    output = quantizer(latents)
    cotangent = rearrange(recording.inputs["vq_train.cot"], "b c h w -> b (h w) c")
    loss = output.losses["codebook"] + output.losses["commitment"]
    (through,) = torch.autograd.grad((output.quantized * cotangent).sum(), latents, retain_graph=True)
    wanted = [latents, quantizer.codebook.weight, quantizer.phis[0].weight]
    of_latents, of_codebook, of_phi = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
    return {
        "vq_train.fhat": _maps(output.quantized.detach(), side),
        "vq_train.loss": loss.detach()[None],
        "vq_train.grad_from_cot": _maps(through, side),
        "vq_train.grad_f_from_loss": _maps(of_latents, side),
        "vq_train.grad_codebook_from_loss": of_codebook,
        "vq_train.grad_phi0_weight_from_loss": of_phi,
    }
