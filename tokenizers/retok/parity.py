"""Replay of what the official ReToK tokenizer and generator gave (recordings of system `retok`).

Sizes and options are read from the recording's config and weights; the length of a prefix from the name or meaning of
the output.
"""

import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.retok import ReToKGPT
from tessellar.models.retok.official import gpt_from_official
from tessellar.parity.recording import Recording, numbers
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, LateStep
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok.official import tokenizer_from_official
from tessellar.tokenizers.retok.tokenizer import Inferred, ReToK

FIXED = {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True, "use_attn": False}
OFFICIAL_BETWEEN = 1.0001  # their scale where guidance is meant to be off


def _tokenizer(recording: Recording) -> ReToK:
    """In eval mode, with nothing inferred: the released code keeps all N tokens and has no schedule."""
    config, state = recording.config, recording.weights["tokenizer"]
    other = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    if other:
        raise UserError(f"no published ReToK has {other}; this tokenizer is {FIXED}")
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        commitment_weight=config.get("commit_loss_beta", 0.25),
        rotation=config.get("rot", True),
    )
    made = tokenizer_from_official(
        state,
        config["encoder"]["heads"],
        config["decoder"]["heads"],
        config["distill_depth"],
        quantizer=quantizer,
        inferred=Inferred(nested_dropout=False, semantic_schedule="constant"),
        feature_weight=1.0,
    )
    expected = (config["image_size"], config["num_latent_tokens"], config["keep_tokens"], config["redundant_tokens"])
    if (made.image_size[0], made.num_tokens, made.always, made.redundant) != expected:
        raise UserError(f"the weights are of {made.layout} at {made.image_size}, not of the config's {expected}")
    return made


@torch.no_grad()
def encode(recording: Recording) -> dict[str, Tensor]:
    """Map, latents, tokens and quantized vectors, redundant ones included."""
    tokenizer, images = _tokenizer(recording), recording.inputs["images"]
    spatial = tokenizer.encoder(images)
    latents = tokenizer.latents(spatial)
    return {
        "spatial": spatial,
        "latents": rearrange(latents, "b t c -> b c 1 t"),
        "indices": tokenizer.encode_all(images),
        "quant": rearrange(tokenizer.quantizer(latents).quantized, "b t c -> b c 1 t"),
    }


@torch.no_grad()
def decode(recording: Recording) -> dict[str, Tensor]:
    """Images of the first k tokens."""
    tokenizer = _tokenizer(recording)
    tokens, outputs = tokenizer.encode_all(recording.inputs["images"]), {}
    for name in recording.names("output", {"tok_decode"}):
        told = re.fullmatch(r"image_k(\d+)", name)
        length = int(told[1] if told else numbers(recording.meanings[name]).get("num_tokens", tokenizer.num_tokens))
        outputs[name] = (tokenizer.decode if length <= tokenizer.num_tokens else tokenizer.decode_all)(
            tokens[:, :length]
        )
    return outputs


@torch.no_grad()
def train(recording: Recording) -> dict[str, Tensor]:
    """A training pass and its losses before their weights."""
    tokenizer, images = _tokenizer(recording).train(), recording.inputs["images"]
    output, spatial = tokenizer(images), tokenizer.encoder(images)
    vectors = tokenizer.quantizer(tokenizer.latents(spatial)).quantized[:, : tokenizer.num_tokens]
    semantic = tokenizer.spread(vectors).semantic
    assert semantic is not None
    return {
        "train/recon": output.reconstruction,
        "train/direct_recon": tokenizer.decoder(spatial),
        "train/vq_loss": output.losses["codebook"],
        "train/commit_loss": output.losses["commitment"],
        "train/feature_rec_loss": output.losses["feature"],
        "train/inner_feat": semantic,
        "train/proj_loss": cosine_distance(semantic, recording.inputs["train/teacher"]).mean() - 1,
    }


def rotation(recording: Recording) -> dict[str, Tensor]:
    """The quantizer's output and the gradient that it passes on."""
    tokenizer = _tokenizer(recording)
    z = recording.inputs["rot/z"].clone().requires_grad_()
    quantized = tokenizer.quantizer(rearrange(z, "b c h w -> b (h w) c")).quantized
    out = rearrange(quantized, "b (h w) c -> b c h w", h=z.shape[2])
    (gradient,) = torch.autograd.grad((out * recording.inputs["rot/w"]).sum(), z)
    return {"rot/out": out, "rot/grad": gradient}


def _generator(recording: Recording) -> ReToKGPT:
    config = recording.config["gpt"]
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    return gpt_from_official(recording.weights["generator"], layout, config["n_head"], config["multiple_of"])


@torch.no_grad()
def gpt(recording: Recording) -> dict[str, Tensor]:
    """Teacher-forced logits with the class and with the null class, and the loss."""
    generator, tokens = _generator(recording), recording.inputs["gpt/tokens"]
    condition = Condition(ids=recording.inputs["gpt/class_ids"])
    scores, null = generator.score(tokens, condition), generator.score(tokens, generator.null(condition))
    assert isinstance(scores, Logits) and isinstance(null, Logits)
    return {
        "gpt/logits": scores.logits,
        "gpt/loss": generator.loss(tokens, condition)["cross_entropy"],
        "gpt/logits_uncond": null.logits,
    }


def gpt_decoding(recording: Recording) -> dict[str, Tensor]:
    """Greedy tokens and guided probabilities of every selected run."""
    generator, outputs = _generator(recording), {}
    condition = Condition(ids=recording.inputs["gpt/class_ids"])
    for run, settings in recording.config["gpt_generation"].items():
        if f"gen_{run}" in recording.cases:
            tokens, probs = _greedy(generator, condition, _guidance(settings))
            outputs |= {f"gpt/gen_{run}/ids": tokens, f"gpt/gen_{run}/probs": probs}
    return outputs


def _guidance(settings: dict[str, Any]) -> Guidance:
    scale, schedule = float(settings.get("cfg_scale", 1.0)), settings.get("cfg_schedule", "constant")
    options = settings.get("cfg_schedule_kwargs") or {}
    if scale <= 1:
        return NO_GUIDANCE
    if schedule == "constant":
        return Guidance(Constant(scale))
    if schedule == "step":
        return Guidance(LateStep(scale, float(options.get("window_start", 0.18)), OFFICIAL_BETWEEN))
    raise UserError(f"the guidance schedule {schedule!r} of this recording is not known")


@torch.no_grad()
def _greedy(generator: ReToKGPT, condition: Condition, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, N] with a cache, and the guided probabilities [B, N, V] of each step."""
    state, tokens, probs = generator.start(condition, guidance), generator.layout.blank(condition.batch), []
    for step in decode_from(generator, state, Choice(temperature=0), Noise(range(condition.batch)), tokens):
        tokens = step.tokens
        assert isinstance(step.distribution, Logits)
        probs.append(step.distribution.logits.softmax(-1))
    return tokens, torch.cat(probs, dim=1)
