"""Replays of the official FlexTok tokenizer (recordings of system `flextok`)."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.layers.time_embedding import sinusoid
from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.processes import flow
from tessellar.processes.apg import APG
from tessellar.tokenizers.flextok.flow_decoding import FlowDecoding, flow_loss
from tessellar.tokenizers.flextok.official import Modules, from_official
from tessellar.tokenizers.flextok.tokenizer import FlexTok
from tessellar.tokenizers.flextok.transformer import TIME_PERIOD, prefix_mask
from tessellar.tokenizers.quantizers.fsq import FSQ


def _tokenizer(recording: Recording, null: str | None = None) -> FlexTok:
    """In eval mode; with another null condition than the config's where one is named."""
    config = recording.config
    state = recording.weights["model"]
    decoder = Modules(config, "decoder")
    key, entry = decoder.find("LearnedNullCond", "ZeroNullCond")
    if null is not None and not entry["_target_"].endswith(null):
        name = key.rpartition(".")[2]
        modules = {**decoder.entries, name: {**entry, "_target_": null}}
        config = {**config, "decoder": {**config["decoder"], "module_dict": modules}}
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".nullcond")}
    return from_official(state, config, recording.inputs["image"].shape[-1])


def _codes(recording: Recording, tokenizer: FlexTok) -> Tensor:
    return tokenizer.quantizer.decode(tokenizer.encode(recording.inputs["image"]))


@replays("flextok", "shared", "vae")
def vae(recording: Recording) -> Outputs:
    """Moments and latents of the VAE, and its images of them."""
    tokenizer = _tokenizer(recording)
    assert tokenizer.vae is not None
    images = recording.inputs["image"]
    latents = tokenizer.latents(images)
    return {
        "vae/moments": as_map(tokenizer.vae.latents(images), latents.shape[-2]),
        "vae/latents": latents,
        "vae/decode_of_latents": tokenizer.render(latents),
    }


@replays("flextok", "shared", "enc")
def encode(recording: Recording) -> Outputs:
    """Codes, tokens, the mask, and tokens of fewer registers."""
    tokenizer = _tokenizer(recording)
    images = recording.inputs["image"]
    codes = tokenizer.encoder(tokenizer.latents(images))
    mask = prefix_mask(tokenizer.grid.patches**2, tokenizer.num_tokens)
    outputs = {
        "enc/latents": codes,
        "enc/mask_single": mask.to(torch.uint8),
        "enc/quants": tokenizer.quantizer(codes).quantized,
        "enc/token_ids": tokenizer.encode(images),
    }
    for name, settings in recording.each("enc/token_ids_sample*"):
        image = images[settings["sample"]][None]
        outputs[name] = tokenizer.encode(image, settings["num_registers"])
    return outputs


@replays("flextok", "shared", "fsq")
def fsq(recording: Recording) -> Outputs:
    """The quantizer alone."""
    quantizer = _tokenizer(recording).quantizer
    assert isinstance(quantizer, FSQ)
    z = recording.inputs["fsq/z"]
    return {
        "fsq/bounded": quantizer.bound(z),
        "fsq/quant": quantizer(z).quantized,
        "fsq/index": quantizer.encode(z),
        "fsq/codes": quantizer.decode(recording.inputs["fsq/ids"]),
    }


@replays("flextok", "shared", "time")
def time(recording: Recording) -> Outputs:
    """Features of times, and what the decoder makes of them."""
    decoder = _tokenizer(recording).decoder
    t = recording.inputs["time/t"]
    return {
        "time/sinusoid": sinusoid(t * decoder.time_factor, decoder.time.channels, TIME_PERIOD),
        "time/emb": decoder.embed_time(t),
    }


@replays("flextok", "shared", "vel")
def velocity(recording: Recording) -> Outputs:
    """Velocities with some registers kept, with all, and without a condition of either kind."""
    inputs = recording.inputs
    noise = inputs["vel/noise"]
    t = inputs["vel/sigma"]
    tokenizer = _tokenizer(recording)
    latents = tokenizer.latents(inputs["image"])
    outputs = {"vel/xt": flow.interpolate(latents, noise, t.view(-1, 1, 1, 1))}
    for name in recording.names("output", {"vel"}):
        if name in outputs:
            continue
        settings = recording.settings(name)
        model = _tokenizer(recording, settings.get("nullcond"))
        kept = inputs["vel/keep_k"]
        if "eval_keep_k" in settings:
            kept = torch.full(t.shape, settings["eval_keep_k"])
        null = torch.full(t.shape, settings["eval_dropout_mask"])
        found = model.predict(latents, noise, t, _codes(recording, model), kept, null=null)
        patches = rearrange(found.features, "b (h w) d -> b h w d", h=tokenizer.grid.patches)
        outputs[name] = patches if name.endswith("patches") else found.velocity
    return outputs


@replays("flextok", "shared", "dec")
def mask(recording: Recording) -> Outputs:
    """The decoder hides nothing inside an image."""
    tokenizer = _tokenizer(recording)
    length = tokenizer.grid.patches**2 + tokenizer.num_tokens
    return {"dec/mask_single": torch.ones(length, length, dtype=torch.uint8)}


@replays("flextok", "shared", "train")
def train(recording: Recording) -> Outputs:
    """The loss of given times and noise."""
    tokenizer = _tokenizer(recording)
    noise = recording.inputs["vel/noise"]
    t = recording.inputs["train/sigma"]
    settings = recording.settings("train/v_pred")
    latents = tokenizer.latents(recording.inputs["image"])
    kept = torch.full(t.shape, settings["eval_keep_k"])
    null = torch.full(t.shape, settings["eval_dropout_mask"])
    codes = _codes(recording, tokenizer)
    predicted = tokenizer.predict(latents, noise, t, codes, kept, null=null).velocity
    return {
        "train/xt": flow.interpolate(latents, noise, t.view(-1, 1, 1, 1)),
        "train/v_pred": predicted,
        "train/loss_per_sample": flow_loss(predicted, latents, noise),
    }


def _projection(settings: Mapping[str, Any]) -> APG | None:
    if not settings["perform_norm_guidance"]:
        return None
    return APG(settings["momentum"], settings["norm_threshold"], settings["eta"])


@replays("flextok", "apg")
def apg(recording: Recording) -> Outputs:
    """Guidance of given predictions, one step after another."""
    cond = recording.inputs["apg/cond"]
    uncond = recording.inputs["apg/uncond"]
    outputs = {}
    for name in recording.names("output", {"apg"}):
        settings = recording.settings(name)
        scale = settings["guidance_scale"]
        projection = _projection(settings)
        if projection is None:
            outputs[name] = uncond + scale * (cond - uncond)
            continue
        average = None
        steps = []
        for c, u in zip(cond.split(1), uncond.split(1), strict=True):
            guided, average = projection.step(c, u, scale, average)
            steps.append(guided)
        outputs[name] = torch.cat(steps)
    return outputs


@replays("flextok", "shared", "decode")
def decode(recording: Recording) -> Outputs:
    """Latents and images of prefixes of several lengths, of every recorded run."""
    tokenizer = _tokenizer(recording)
    inputs = recording.inputs
    tokens = tokenizer.encode(inputs["image"])
    outputs = {}
    for name, settings in recording.each("decode/*_latents"):
        how = FlowDecoding(settings["timesteps"], settings["guidance_scale"], _projection(settings))
        start = inputs["decode/init_noise"]
        latents = tokenizer.denoise(tokens, start, how, lengths=inputs["decode/keep_k"])
        outputs[name] = latents
        outputs[name.replace("_latents", "_image")] = tokenizer.render(latents)
    return outputs
