"""Replays of AliTok's generator (recordings of system `alitok`): scores, gradients, four samplings,
the learning rate.

`gen_small` has the tiny tokenizer's prefix and grid, `gen` the published ones; one set of weights
serves both. Their last row of logits (behind the last token, unused) is what our generator predicts
for an entity past the end.
"""

from functools import cache

import torch
from torch import Tensor

from tessellar.interop.options import check_options
from tessellar.models.alitok.model import AliTokAR
from tessellar.models.alitok.official import KEYS, from_official
from tessellar.parity.forms import to_unit
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import (
    Decoded,
    drawn,
    gradient_norm,
    gradient_norms,
    greedy,
    logits_of,
)
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, PowerCosine
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.schedules import Schedule
from tessellar.tokenizers.alitok.parity import recorded_tokenizer

SIZES = {
    "gen_small": "gen_small",
    "gen": "gen_full",
}  # part of a tensor's name: entry of the config
READ = "hidden_size num_hidden_layers num_attention_heads condition_num_classes".split()


def _generator(recording: Recording, part: str) -> AliTokAR:
    check_options(recording.config["gen"], "the config's gen", READ)
    sizes = recording.config[SIZES[part]]
    check_options(sizes, f"the config's {SIZES[part]}", ("image_seq_len", "prefix", "grid"))
    kind = Categorical(recording.config["generator_codebook_size"])
    grid = (sizes["grid"], sizes["grid"])
    layout = Layout((Segment((sizes["prefix"],), kind, "prefix"), Segment(grid, kind, "patches")))
    return from_official(recording.weights["generator"], layout, dropout=0.0)


def _condition(recording: Recording, part: str) -> Condition:
    return Condition(ids=recording.inputs[f"{part}/class_ids"])


@torch.no_grad()
def _logits(generator: AliTokAR, tokens: Tensor, condition: Condition) -> Tensor:
    """Logits [B, N + 1, V] of all tokens and of the one past the end."""
    state = generator.start(condition)
    return logits_of(generator.predict(state, tokens, count=generator.layout.length + 1))


@replays("alitok", "gen_small_rope", "gen_rope")
def rotations(recording: Recording) -> dict[str, Tensor]:
    """The rotary tables."""
    outputs = {}
    for name in recording.outputs("*/rope"):
        generator = _generator(recording, name.partition("/")[0])
        outputs[name] = torch.stack([generator.rope_cos, generator.rope_sin], dim=-1)
    return outputs


@replays("alitok", "gen_small_tf", "gen_tf")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Logits of given tokens, with a class and without one."""
    outputs = {}
    for name in recording.outputs("gen*/logits*"):
        part = name.partition("/")[0]
        generator = _generator(recording, part)
        condition = _condition(recording, part)
        if recording.settings(name).get("uncond", False):
            condition = generator.null(condition)
        outputs[name] = _logits(generator, recording.inputs[f"{part}/tokens"], condition)
    return outputs


@replays("alitok", "gen_train", gradients=True)
def training(recording: Recording) -> dict[str, Tensor]:
    """Loss, accuracy and gradients of a training pass whose dropped classes are recorded."""
    generator = _generator(recording, "gen").train()
    tokens = recording.inputs["gen/tokens"]
    given = _condition(recording, "gen")
    kept = recording.inputs["gen/label_drop"] == 0
    condition = given.where(kept, generator.null(given))
    distribution = generator.score(tokens, condition)
    assert isinstance(distribution, Logits) and condition.ids is not None
    loss = distribution.cross_entropy(tokens)
    right = distribution.logits.argmax(-1) == tokens
    norms = gradient_norms(loss, generator, KEYS.to_official)
    named = recording.outputs("gen/grad_norm/*")
    return {
        "gen/condition": condition.ids + generator.vocab + 1,
        "gen/train_logits": _logits(generator, tokens, condition),
        "gen/loss": loss,
        "gen/correct_tokens": right.float().mean(),
        "gen/grad_norm": gradient_norm(loss, generator),
        **{name: norms[recording.settings(name)["grad_to"]] for name in named},
    }


def _schedule(recording: Recording, name: str) -> PowerCosine:
    settings = recording.settings(name)
    return PowerCosine(settings["guidance_scale"], settings["guidance_scale_pow"], reach_end=False)


@replays("alitok", "gen_small_scale", "gen_scale")
def scales(recording: Recording) -> dict[str, Tensor]:
    """The guidance scale of every step."""
    outputs = {}
    for name in recording.outputs("*/cfg_scale"):
        entities = _generator(recording, name.partition("/")[0]).entities
        steps = torch.arange(entities.count)[None]
        outputs[name] = _schedule(recording, name)(steps, entities)[0]
    return outputs


def _sampled(recording: Recording, generator: AliTokAR, name: str) -> Decoded:
    """A run `part/run/ids`: a scale of 0 is one branch; greedy, or drawn at recorded uniforms."""
    settings = recording.settings(name)
    condition = _condition(recording, name.partition("/")[0])
    guidance = Guidance(_schedule(recording, name)) if settings["guidance_scale"] else NO_GUIDANCE
    if settings["greedy"]:
        return greedy(generator, condition, guidance)
    choice = Choice(temperature=settings["randomize_temperature"])
    uniforms = recording.inputs[name.replace("/ids", "/u")]
    return drawn(generator, condition, guidance, choice, uniforms=uniforms)


@replays("alitok", *(f"{part}_{run}" for part in SIZES for run in ("pow", "low", "nocfg", "rand")))
def sampling(recording: Recording) -> dict[str, Tensor]:
    """Ids and guided logits of the four runs, with a cache, and the image of one of them."""
    generator = cache(lambda part: _generator(recording, part))
    outputs = {}
    for name in recording.outputs("*/gen_*/ids"):
        part = name.partition("/")[0]
        found = _sampled(recording, generator(part), name)
        outputs[name] = found.tokens
        outputs[name.replace("/ids", "/guided_logits")] = found.logits
    for name in recording.outputs("*/image"):
        tokens = outputs[name.replace("/image", "/gen_pow/ids")]
        outputs[name] = to_unit(recorded_tokenizer(recording, "tokenizer").decode(tokens))
    return outputs


@replays("alitok", "lr")
def learning_rate(recording: Recording) -> dict[str, Tensor]:
    """Linear warm-up from 0, then a cosine to the end."""
    settings = recording.settings("lr/lr")
    updates = settings["num_training_steps"]
    schedule = Schedule(
        decay="cosine",
        warmup=settings["num_warmup_steps"],
        warmup_from=0.0,
        final=settings["end_lr"] / settings["base_lr"],
    )
    factors = [schedule.factor(step, updates) for step in recording.inputs["lr/step"].tolist()]
    return {"lr/lr": settings["base_lr"] * torch.tensor(factors, dtype=torch.float64)}
