"""Replays of AliTok's generator (recordings of system `alitok`): scores, gradients, four samplings,
the learning rate.

`gen_small` has the tiny tokenizer's prefix and grid, `gen` the published ones; one set of weights
serves both.
"""

from functools import cache

import torch

from tessellar.models.alitok.model import AliTokAR
from tessellar.models.alitok.official import KEYS, from_official
from tessellar.parity.forms import to_unit
from tessellar.parity.generation import (
    accuracy,
    beside,
    by_power_cosine,
    learning_rates,
    past_the_end,
    power_cosine,
    scores_of,
    with_dropped,
)
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Decoded, drawn, gradient_norm, greedy, recorded_norms
from tessellar.protocol.choice import Choice
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.schedules import Schedule
from tessellar.tokenizers.alitok.parity import recorded_tokenizer

READ = "hidden_size num_hidden_layers num_attention_heads condition_num_classes".split()
# part of a tensor's name: entry of the config
SIZES = {"gen_small": "gen_small", "gen": "gen_full"}


def _generator(recording: Recording, part: str) -> AliTokAR:
    recording.options("gen", READ)
    sizes = recording.options(SIZES[part], ("image_seq_len", "prefix", "grid"))
    kind = Categorical(recording.config["generator_codebook_size"])
    grid = (sizes["grid"], sizes["grid"])
    layout = Layout((Segment((sizes["prefix"],), kind, "prefix"), Segment(grid, kind, "patches")))
    return from_official(recording.weights["generator"], layout, dropout=0.0)


@replays("alitok", "gen_small_rope", "gen_rope")
def rotations(recording: Recording) -> Outputs:
    """The rotary tables."""
    outputs = {}
    for name in recording.outputs("*/rope"):
        generator = _generator(recording, name.partition("/")[0])
        outputs[name] = torch.stack([generator.rope_cos, generator.rope_sin], dim=-1)
    return outputs


@replays("alitok", "gen_small_tf", "gen_tf")
def scores(recording: Recording) -> Outputs:
    """Logits of given tokens, with a class and without one."""
    outputs = {}
    for name, settings in recording.each("gen*/logits*"):
        part = name.partition("/")[0]
        generator = _generator(recording, part)
        condition = recording.classes(f"{part}/class_ids")
        if settings.get("uncond", False):
            condition = generator.null(condition)
        outputs[name] = past_the_end(generator, recording.inputs[f"{part}/tokens"], condition)
    return outputs


@replays("alitok", "gen_train", gradients=True)
def training(recording: Recording) -> Outputs:
    """Loss, accuracy and gradients of a training pass whose dropped classes are recorded."""
    generator = _generator(recording, "gen").train()
    tokens = recording.inputs["gen/tokens"]
    classes = recording.classes("gen/class_ids")
    condition = with_dropped(classes, generator, recording.inputs["gen/label_drop"])
    assert condition.ids is not None
    found = scores_of(generator, tokens, condition)
    loss = found.cross_entropy(tokens)
    norms = recorded_norms(
        recording, "gen/grad_norm/*", loss, generator, to_official=KEYS.to_official
    )
    return {
        "gen/condition": condition.ids + generator.vocab + 1,
        "gen/train_logits": past_the_end(generator, tokens, condition),
        "gen/loss": loss,
        "gen/correct_tokens": accuracy(found.logits, tokens),
        "gen/grad_norm": gradient_norm(loss, generator),
        **norms,
    }


@replays("alitok", "gen_small_scale", "gen_scale")
def scales(recording: Recording) -> Outputs:
    """The guidance scale of every step."""
    outputs = {}
    for name, settings in recording.each("*/cfg_scale"):
        entities = _generator(recording, name.partition("/")[0]).entities
        outputs[name] = power_cosine(settings)(torch.arange(entities.count)[None], entities)[0]
    return outputs


def _sampled(recording: Recording, generator: AliTokAR, name: str) -> Decoded:
    """A run `part/run/ids`: a scale of 0 is one branch; greedy, or drawn at recorded uniforms."""
    settings = recording.settings(name)
    condition = recording.classes(f"{name.partition('/')[0]}/class_ids")
    guidance = by_power_cosine(settings)
    if settings["greedy"]:
        return greedy(generator, condition, guidance)
    choice = Choice(temperature=settings["randomize_temperature"])
    uniforms = recording.inputs[beside(name, "u")]
    return drawn(generator, condition, guidance, choice, uniforms=uniforms)


@replays("alitok", *(f"{part}_{run}" for part in SIZES for run in ("pow", "low", "nocfg", "rand")))
def sampling(recording: Recording) -> Outputs:
    """Ids and guided logits of the four runs, with a cache, and the image of one of them."""
    generator = cache(lambda part: _generator(recording, part))
    outputs = {}
    for name in recording.outputs("*/gen_*/ids"):
        found = _sampled(recording, generator(name.partition("/")[0]), name)
        outputs[name] = found.tokens
        outputs[beside(name, "guided_logits")] = found.logits
    for name in recording.outputs("*/image"):
        tokens = outputs[name.replace("/image", "/gen_pow/ids")]
        outputs[name] = to_unit(recorded_tokenizer(recording, "tokenizer").decode(tokens))
    return outputs


@replays("alitok", "lr")
def rates(recording: Recording) -> Outputs:
    """Linear warm-up from 0, then a cosine to the end."""
    settings = recording.settings("lr/lr")
    peak = settings["base_lr"]
    schedule = Schedule(
        decay="cosine",
        warmup=settings["num_warmup_steps"],
        warmup_from=0.0,
        final=settings["end_lr"] / peak,
    )
    steps = recording.inputs["lr/step"]
    return {"lr/lr": learning_rates(schedule, peak, steps, settings["num_training_steps"])}
