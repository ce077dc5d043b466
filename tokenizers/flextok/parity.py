"""Replay of what the official FlexTok tokenizer gave (recordings of system `flextok`).

Sizes and options are read from the recording's config and weights; steps, scales and lengths from the names and
meanings of the outputs.
"""

import re
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from tessellar.layers.time_embedding import sinusoid
from tessellar.parity.recording import Recording, numbers
from tessellar.processes import flow
from tessellar.processes.apg import APG
from tessellar.tokenizers.flextok.flow_decoding import FlowDecoding, flow_loss
from tessellar.tokenizers.flextok.official import Modules, from_official
from tessellar.tokenizers.flextok.tokenizer import FlexTok
from tessellar.tokenizers.flextok.transformer import TIME_PERIOD, prefix_mask
from tessellar.tokenizers.quantizers.fsq import FSQ


def _tokenizer(recording: Recording, null: str | None = None) -> FlexTok:
    """In eval mode; with another null condition than the config's where one is named."""
    config, state = recording.config, recording.weights["model"]
    if null is not None:
        entry = Modules(config, "decoder").find("LearnedNullCond", "ZeroNullCond")[0]
        name = entry.rpartition(".")[2]
        side = config["decoder"]["module_dict"]
        changed = {**side, name: {**side[name], "_target_": null}}
        config = {**config, "decoder": {**config["decoder"], "module_dict": changed}}
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".nullcond")}
    return from_official(state, config, recording.inputs["image"].shape[-1])


def _single(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.uint8)


@torch.no_grad()
def vae(recording: Recording) -> dict[str, Tensor]:
    """Moments and latents of the VAE, and its images of them."""
    tokenizer, images = _tokenizer(recording), recording.inputs["image"]
    assert tokenizer.vae is not None
    latents = tokenizer.latents(images)
    moments = rearrange(tokenizer.vae.latents(images), "b (h w) c -> b c h w", h=latents.shape[-1])
    return {"vae/moments": moments, "vae/latents": latents, "vae/decode_of_latents": tokenizer.render(latents)}


@torch.no_grad()
def encode(recording: Recording) -> dict[str, Tensor]:
    """Codes, tokens, the mask, and tokens of fewer registers."""
    tokenizer, images = _tokenizer(recording), recording.inputs["image"]
    codes = tokenizer.encoder(tokenizer.latents(images))
    outputs = {
        "enc/latents": codes,
        "enc/mask_single": prefix_mask(tokenizer.grid.patches**2, tokenizer.num_tokens).to(torch.uint8),
        "enc/quants": tokenizer.quantizer(codes).quantized,
        "enc/token_ids": tokenizer.encode(images),
    }
    for name in recording.names("output", {"enc"}):
        if told := re.fullmatch(r"enc/token_ids_sample(\d+)_with_(\d+)_registers", name):
            image, count = int(told[1]), int(told[2])
            outputs[name] = tokenizer.encode(images[image : image + 1], count)
    return outputs


@torch.no_grad()
def fsq(recording: Recording) -> dict[str, Tensor]:
    """The quantizer alone."""
    quantizer, z = _tokenizer(recording).quantizer, recording.inputs["fsq/z"]
    assert isinstance(quantizer, FSQ)
    return {
        "fsq/bounded": quantizer.bound(z),
        "fsq/quant": quantizer(z).quantized,
        "fsq/index": quantizer.encode(z),
        "fsq/codes": quantizer.decode(recording.inputs["fsq/ids"]),
    }


@torch.no_grad()
def time(recording: Recording) -> dict[str, Tensor]:
    """Features of times, and what the decoder makes of them."""
    decoder, t = _tokenizer(recording).decoder, recording.inputs["time/t"]
    return {
        "time/sinusoid": sinusoid(t * decoder.time_factor, decoder.time.channels, TIME_PERIOD),
        "time/emb": decoder.embed_time(t),
    }


@torch.no_grad()
def velocity(recording: Recording) -> dict[str, Tensor]:
    """Velocities with some registers kept, with all, and without a condition of either kind."""
    tokenizer, inputs = _tokenizer(recording), recording.inputs
    latents, noise, t = tokenizer.latents(inputs["image"]), inputs["vel/noise"], inputs["vel/sigma"]
    codes = tokenizer.quantizer.decode(tokenizer.encode(inputs["image"]))
    every, kept = torch.full(t.shape, tokenizer.num_tokens), inputs["vel/keep_k"]
    yes = torch.ones(t.shape, dtype=torch.bool)
    some = tokenizer.predict(latents, noise, t, codes, kept)
    zero = _tokenizer(recording, "ZeroNullCond")
    return {
        "vel/xt": flow.interpolate(latents, noise, t.view(-1, 1, 1, 1)),
        "vel/cond": some.velocity,
        "vel/repa_patches": rearrange(some.features, "b (h w) d -> b h w d", h=tokenizer.grid.patches),
        "vel/uncond": tokenizer.predict(latents, noise, t, codes, every, yes).velocity,
        "vel/uncond_zero_variant": zero.predict(latents, noise, t, codes, every, yes).velocity,
        "vel/cond_full": tokenizer.predict(latents, noise, t, codes, every).velocity,
    }


@torch.no_grad()
def mask(recording: Recording) -> dict[str, Tensor]:
    """The decoder hides nothing inside an image."""
    tokenizer = _tokenizer(recording)
    return {"dec/mask_single": _single(tokenizer.grid.patches**2 + tokenizer.num_tokens)}


@torch.no_grad()
def train(recording: Recording) -> dict[str, Tensor]:
    """The loss of given times and noise, with all registers."""
    tokenizer, inputs = _tokenizer(recording), recording.inputs
    latents, noise, t = tokenizer.latents(inputs["image"]), inputs["vel/noise"], inputs["train/sigma"]
    codes = tokenizer.quantizer.decode(tokenizer.encode(inputs["image"]))
    predicted = tokenizer.predict(latents, noise, t, codes, torch.full(t.shape, tokenizer.num_tokens)).velocity
    return {
        "train/xt": flow.interpolate(latents, noise, t.view(-1, 1, 1, 1)),
        "train/v_pred": predicted,
        "train/loss_per_sample": flow_loss(predicted, latents, noise),
    }


@torch.no_grad()
def apg(recording: Recording) -> dict[str, Tensor]:
    """Guidance of given predictions, one step after another."""
    cond, uncond, outputs = recording.inputs["apg/cond"], recording.inputs["apg/uncond"], {}
    for name in recording.names("output", {"apg"}):
        told = numbers(recording.meanings[name])
        if name == "apg/cfg":
            outputs[name] = uncond + told["scale"] * (cond - uncond)
            continue
        settings, average, steps = APG(told.get("momentum", 0.0), told.get("r"), told.get("eta", 0.0)), None, []
        for c, u in zip(cond.split(1), uncond.split(1), strict=True):
            guided, average = settings.step(c, u, told["scale"], average)
            steps.append(guided)
        outputs[name] = torch.cat(steps)
    return outputs


@torch.no_grad()
def decode(recording: Recording) -> dict[str, Tensor]:
    """Latents and images of prefixes of several lengths, of every recorded run."""
    tokenizer, inputs, outputs = _tokenizer(recording), recording.inputs, {}
    tokens = tokenizer.encode(inputs["image"])
    for name in recording.names("output", {"decode"}):
        if not (run := re.fullmatch(r"decode/(\w+)_latents", name)):
            continue
        meaning = recording.meanings[name]
        projected = "norm_guidance=True" in meaning
        told = re.search(r"(\d+) Euler steps", meaning)
        how = FlowDecoding(int(told[1]) if told else 20, numbers(meaning)["guidance"])
        how = how if projected else replace(how, projection=None)
        latents = tokenizer.denoise(tokens, inputs["decode/init_noise"], how, lengths=inputs["decode/keep_k"])
        outputs |= {name: latents, f"decode/{run[1]}_image": tokenizer.render(latents)}
    return outputs
