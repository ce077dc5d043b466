"""Replay of VAR's tokenizer, transformer and sampler (recordings of system `var`)."""

import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.models.var.model import VAR
from tessellar.models.var.official import from_official
from tessellar.parity.recording import Recording
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.tokenizers.var import VARVQVAE
from tessellar.tokenizers.var.official import vqvae_from_official


def var(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    return outputs


def _part(recording: Recording, name: str) -> dict[str, Tensor]:
    """One of the two state dicts that are stored together."""
    state = recording.weights["model"]
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def _vqvae(recording: Recording) -> VARVQVAE:
    return vqvae_from_official(_part(recording, "vae"), tuple(recording.config["vae"]["v_patch_nums"]))


def _generator(recording: Recording) -> VAR:
    vqvae = _vqvae(recording)
    generator = from_official(_part(recording, "var"), vqvae.layout, recording.config["var"]["num_heads"])
    generator.bind(vqvae)
    return generator


@torch.no_grad()
def _tokenizer(recording: Recording) -> dict[str, Tensor]:
    vqvae, images = _vqvae(recording), recording.inputs["image"]
    tokens = vqvae.encode(images)
    quantizer = vqvae.quantizer
    latents = vqvae.latents(images)
    return {
        "vae.f": rearrange(latents, "b (h w) c -> b c h w", h=quantizer.sides[-1]),
        "vae.idx": tokens,
        "vae.fhat": torch.stack(list(quantizer.sums(tokens))),
        "vae.rec": vqvae(images).reconstruction.clamp(-1, 1),
        "vae.idx_to_img": vqvae.decode(tokens).clamp(-1, 1),
        "vae.var_input": vqvae.next_inputs(tokens, len(quantizer.sides)),
    }


def _quantizer(recording: Recording) -> dict[str, Tensor]:
    vqvae = _vqvae(recording)
    quantizer, side = vqvae.quantizer, vqvae.quantizer.sides[-1]
    latents = vqvae.latents(recording.inputs["image"]).detach().requires_grad_()
    output = quantizer(latents)
    cotangent = rearrange(recording.inputs["vq_train.cot"], "b c h w -> b (h w) c")
    loss = output.losses["codebook"] + output.losses["commitment"]
    (through,) = torch.autograd.grad((output.quantized * cotangent).sum(), latents, retain_graph=True)
    wanted = [latents, quantizer.codebook.weight, quantizer.phis[0].weight]
    gradients = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]

    def maps(x: Tensor) -> Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=side)

    return {
        "vq_train.fhat": maps(output.quantized.detach()),
        "vq_train.loss": loss.detach()[None],
        "vq_train.grad_from_cot": maps(through),
        "vq_train.grad_f_from_loss": maps(gradients[0]),
        "vq_train.grad_codebook_from_loss": gradients[1],
        "vq_train.grad_phi0_weight_from_loss": gradients[2],
    }


@torch.no_grad()
def _scores(recording: Recording) -> dict[str, Tensor]:
    generator = _generator(recording)
    tokens = _vqvae(recording).encode(recording.inputs["image"])
    condition = Condition(ids=recording.inputs["labels"])
    outputs = {}
    for name, rows in (("var.logits", condition), ("var.logits_uncond", generator.null(condition))):
        scores = generator.score(tokens, rows)
        assert isinstance(scores, Logits)
        outputs[name] = scores.logits
    return outputs


def _greedy(recording: Recording) -> dict[str, Tensor]:
    """Their scale t = cfg k / (K - 1) multiplies c - u beside c, so ours goes from 1 to 1 + cfg."""
    generator, settings = _generator(recording), recording.config["sample"]
    guidance = Guidance(Linear(1 + settings["cfg"]))
    tokens, logits = greedy(generator, Condition(ids=recording.inputs["labels"]), guidance)
    with torch.no_grad():
        images = _vqvae(recording).decode(tokens).clamp(-1, 1)
    return {"greedy.idx": tokens, "greedy.logits": logits, "greedy.image01": (images + 1) / 2}


def _filters(recording: Recording) -> dict[str, Tensor]:
    logits, outputs = recording.inputs["filter.logits"], {}
    for name in recording.names("output", {"filter"}):
        meaning = recording.meanings[name]
        top_k = re.search(r"top_k (\d+)", meaning)
        top_p = re.search(r"top_p (0?\.\d+)", meaning)
        choice = Choice(top_k=int(top_k[1]) if top_k else 0, top_p=float(top_p[1]) if top_p else 1.0)
        outputs[name] = choice.probs(logits) > 0
    return outputs


CASES: dict[str, Any] = {
    "vae": _tokenizer,
    "vq_train": _quantizer,
    "train": _scores,
    "greedy": _greedy,
    "filter": _filters,
}
