"""Replays of LlamaGen's recorded outputs: scores, losses, gradients, guided greedy decoding, filters."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch

from tessellar.errors import UserError
from tessellar.interop.options import require
from tessellar.models.llamagen.model import LlamaGen
from tessellar.models.llamagen.official import from_config
from tessellar.models.parts.llama import CaptionPrefix
from tessellar.parity.generation import beside, filtered, scores_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import gradient_norm, greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Interval
from tessellar.protocol.layout import Categorical, grid_layout


def _generator(recording: Recording, part: str) -> LlamaGen:
    config = recording.config[part]
    side = isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise UserError(f"block_size {config['block_size']} is not a square number of tokens")
    layout = grid_layout(side, side, Categorical(config["vocab_size"]))
    return from_config(recording.weights[part], config, layout)


def _greedy_runs(
    recording: Recording, part: str, generator: LlamaGen, condition: Condition
) -> Outputs:
    outputs = {}
    for name, settings in recording.each(f"{part}/greedy_*/tokens"):
        decoded = greedy(generator, condition, guidance_of(settings))
        outputs[name] = decoded.tokens
        outputs[beside(name, "logits")] = decoded.logits
    return outputs


def guidance_of(settings: Mapping[str, Any]) -> Guidance:
    """No null rows for a scale of at most 1; `cfg_interval` m > -1 guides tokens 0 .. m + 1."""
    require(settings, "the recorded run", {"cfg_schedule": "constant"})
    scale = settings.get("cfg_scale", 1.0)
    interval = settings.get("cfg_interval", -1)
    if scale <= 1:
        return NO_GUIDANCE
    if interval < 0:
        return Guidance(Constant(scale))
    return Guidance(Interval(scale, first=0, last=interval + 1))


@replays("llamagen", "c2i", gradients=True)
def c2i(recording: Recording) -> Outputs:
    """Scores, loss, gradient norm and rotation table of the class-conditional generator."""
    generator = _generator(recording, "c2i")
    tokens = recording.inputs["c2i/tokens"]
    scores = scores_of(generator, tokens, recording.classes("c2i/labels"))
    loss = scores.cross_entropy(tokens)
    return {
        "c2i/logits": scores.logits,
        "c2i/loss": loss,
        "c2i/grad_norm": gradient_norm(loss, generator),
        "c2i/rope_table": torch.stack([generator.rope_cos, generator.rope_sin], dim=-1),
    }


@replays("llamagen", "c2i_gen")
def c2i_gen(recording: Recording) -> Outputs:
    """Greedy decoding with the cache, without guidance, with it, and with an interval."""
    generator = _generator(recording, "c2i")
    return _greedy_runs(recording, "c2i", generator, recording.classes("c2i/gen_labels"))


@replays("llamagen", "t2i")
def t2i(recording: Recording) -> Outputs:
    """Scores, weighted loss, null caption and greedy decoding of the text-conditional generator."""
    generator = _generator(recording, "t2i")
    inputs = recording.inputs
    captions = Condition(valid=inputs["t2i/emb_masks"] > 0, features=inputs["t2i/caption_embs"])
    prefix = generator.conditioning
    assert isinstance(prefix, CaptionPrefix)
    scores = scores_of(generator, inputs["t2i/tokens"], captions)
    return {
        "t2i/logits": scores.logits,
        "t2i/loss": scores.cross_entropy(inputs["t2i/tokens"], inputs["t2i/valid"]),
        "t2i/uncond_projected": prefix.project(prefix.uncond)[None],
        **_greedy_runs(recording, "t2i", generator, captions),
    }


@replays("llamagen", "sample")
def sample(recording: Recording) -> Outputs:
    """Probabilities after temperature, top-k and top-p."""
    return filtered(recording, "sample/*/probs", logits="sample/logits")
