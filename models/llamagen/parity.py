"""Replays of LlamaGen's recorded outputs: teacher-forced logits, losses, gradients, guided greedy decoding, filters.

Everything is read from the recording: sizes from its config, guidance and filter settings from the meaning of each
output, because they are written nowhere else.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen.model import LlamaGen
from tessellar.models.llamagen.official import from_config
from tessellar.models.parts.prefixes import CaptionPrefix
from tessellar.parity.recording import Recording
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Interval
from tessellar.protocol.layout import Categorical, Layout, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from

GREEDY = Choice(temperature=0)


def c2i(recording: Recording) -> dict[str, Tensor]:
    """Teacher-forced logits, loss, gradient norm and rotation table of the class-conditional generator."""
    generator = _generator(recording, "c2i")
    tokens = recording.inputs["c2i/tokens"]
    scores = _score(generator, tokens, Condition(ids=recording.inputs["c2i/labels"]))
    loss = scores.cross_entropy(tokens)
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    return {
        "c2i/logits": scores.logits,
        "c2i/loss": loss,
        "c2i/grad_norm": torch.nn.utils.get_total_norm(gradients),
        "c2i/rope_table": torch.stack([generator.rope_cos, generator.rope_sin], dim=-1),
    }


def c2i_gen(recording: Recording) -> dict[str, Tensor]:
    """Greedy decoding with the cache, without guidance, with it, and with an interval."""
    generator = _generator(recording, "c2i")
    return _greedy_runs(recording, "c2i_gen", generator, Condition(ids=recording.inputs["c2i/gen_labels"]))


def sample(recording: Recording) -> dict[str, Tensor]:
    """Probabilities after temperature, top-k and top-p."""
    logits, outputs = recording.inputs["sample/logits"], {}
    for name in recording.names("output", {"sample"}):
        settings = recording.settings(name)
        choice = Choice(settings.get("temperature", 1.0), int(settings.get("top_k", 0)), settings.get("top_p", 1.0))
        outputs[name] = choice.probs(logits)
    return outputs


def t2i(recording: Recording) -> dict[str, Tensor]:
    """Logits, weighted loss, projected null caption and greedy decoding of the text-conditional generator."""
    generator, inputs = _generator(recording, "t2i"), recording.inputs
    captions = Condition(valid=inputs["t2i/emb_masks"] > 0, features=inputs["t2i/caption_embs"])
    prefix = generator.conditioning
    assert isinstance(prefix, CaptionPrefix)
    with torch.no_grad():
        scores = _score(generator, inputs["t2i/tokens"], captions)
        return {
            "t2i/logits": scores.logits,
            "t2i/loss": scores.cross_entropy(inputs["t2i/tokens"], inputs["t2i/valid"]),
            "t2i/uncond_projected": prefix.project(prefix.uncond)[None],
            **_greedy_runs(recording, "t2i", generator, captions),
        }


def _generator(recording: Recording, part: str) -> LlamaGen:
    config = recording.config[part]
    return from_config(recording.weights[part], config, _layout(config))


def _layout(config: dict[str, Any]) -> Layout:
    side = isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise UserError(f"block_size {config['block_size']} is not a square number of tokens")
    return grid_layout(side, side, Categorical(config["vocab_size"]))


def _score(generator: LlamaGen, tokens: Tensor, condition: Condition) -> Logits:
    scores = generator.score(tokens, condition)
    assert isinstance(scores, Logits)
    return scores


def _greedy_runs(recording: Recording, case: str, generator: LlamaGen, condition: Condition) -> dict[str, Tensor]:
    """Tokens and logits of every `<run>/tokens` output of a case."""
    outputs = {}
    for name in recording.names("output", {case}):
        run, _, kind = name.rpartition("/")
        if kind == "tokens":
            guidance = guidance_of(recording.settings(name))
            outputs[name], outputs[f"{run}/logits"] = greedy(generator, condition, guidance)
    return outputs


def guidance_of(settings: dict[str, float]) -> Guidance:
    """LlamaGen's: no null rows for a scale of at most 1; `cfg_interval` m > -1 guides tokens 0 .. m + 1."""
    scale, interval = settings.get("cfg_scale", 1.0), int(settings.get("cfg_interval", -1))
    if scale <= 1:
        return NO_GUIDANCE
    return Guidance(Constant(scale) if interval < 0 else Interval(scale, 0, interval + 1))


@torch.no_grad()
def greedy(generator: Generator, condition: Condition, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, N] with a cache, and the guided logits [B, N, V] of each step."""
    state, tokens = generator.start(condition, guidance), generator.layout.blank(condition.batch)
    logits = []
    for step in decode_from(generator, state, GREEDY, Noise(range(condition.batch)), tokens):
        tokens = step.tokens
        assert isinstance(step.distribution, Logits)
        logits.append(step.distribution.logits)
    return tokens, torch.cat(logits, dim=1)
