"""Replays of LlamaGen's recorded outputs: teacher-forced logits, losses, gradients, guided greedy
decoding, filters.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen.model import LlamaGen
from tessellar.models.llamagen.official import from_config
from tessellar.models.parts.llama import CaptionPrefix
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import choice_of, gradient_norm, greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Interval
from tessellar.protocol.layout import Categorical, grid_layout


def _generator(recording: Recording, part: str) -> LlamaGen:
    config = recording.config[part]
    side = isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise UserError(f"block_size {config['block_size']} is not a square number of tokens")
    layout = grid_layout(side, side, Categorical(config["vocab_size"]))
    return from_config(recording.weights[part], config, layout)


@replays("llamagen", "c2i", gradients=True)
def c2i(recording: Recording) -> dict[str, Tensor]:
    """Teacher-forced logits, loss, gradient norm and rotation table of the class-conditional
    generator.
    """
    generator = _generator(recording, "c2i")
    tokens = recording.inputs["c2i/tokens"]
    scores = generator.score(tokens, Condition(ids=recording.inputs["c2i/labels"]))
    assert isinstance(scores, Logits)
    loss = scores.cross_entropy(tokens)
    return {
        "c2i/logits": scores.logits,
        "c2i/loss": loss,
        "c2i/grad_norm": gradient_norm(loss, generator),
        "c2i/rope_table": torch.stack([generator.rope_cos, generator.rope_sin], dim=-1),
    }


@replays("llamagen", "c2i_gen")
def c2i_gen(recording: Recording) -> dict[str, Tensor]:
    """Greedy decoding with the cache, without guidance, with it, and with an interval."""
    generator = _generator(recording, "c2i")
    return _greedy_runs(
        recording, "c2i", generator, Condition(ids=recording.inputs["c2i/gen_labels"])
    )


@replays("llamagen", "t2i")
def t2i(recording: Recording) -> dict[str, Tensor]:
    """Logits, weighted loss, projected null caption and greedy decoding of the text-conditional
    generator.
    """
    generator = _generator(recording, "t2i")
    inputs = recording.inputs
    captions = Condition(valid=inputs["t2i/emb_masks"] > 0, features=inputs["t2i/caption_embs"])
    prefix = generator.conditioning
    assert isinstance(prefix, CaptionPrefix)
    scores = generator.score(inputs["t2i/tokens"], captions)
    assert isinstance(scores, Logits)
    return {
        "t2i/logits": scores.logits,
        "t2i/loss": scores.cross_entropy(inputs["t2i/tokens"], inputs["t2i/valid"]),
        "t2i/uncond_projected": prefix.project(prefix.uncond)[None],
        **_greedy_runs(recording, "t2i", generator, captions),
    }


@replays("llamagen", "sample")
def sample(recording: Recording) -> dict[str, Tensor]:
    """Probabilities after temperature, top-k and top-p."""
    logits = recording.inputs["sample/logits"]
    names = recording.outputs("sample/*/probs")
    return {name: choice_of(recording.settings(name)).probs(logits) for name in names}


def _greedy_runs(
    recording: Recording, part: str, generator: LlamaGen, condition: Condition
) -> dict[str, Tensor]:
    """Tokens and logits of every run of a part."""
    outputs = {}
    for name in recording.outputs(f"{part}/greedy_*/tokens"):
        decoded = greedy(generator, condition, guidance_of(recording.settings(name)))
        outputs[name] = decoded.tokens
        outputs[name.replace("/tokens", "/logits")] = decoded.logits
    return outputs


def guidance_of(settings: Mapping[str, Any]) -> Guidance:
    """LlamaGen's: no null rows for a scale of at most 1; `cfg_interval` m > -1 guides tokens 0 .. m
    + 1.
    """
    scale = settings.get("cfg_scale", 1.0)
    interval = settings.get("cfg_interval", -1)
    if scale <= 1:
        return NO_GUIDANCE
    if interval < 0:
        return Guidance(Constant(scale))
    return Guidance(Interval(scale, first=0, last=interval + 1))
