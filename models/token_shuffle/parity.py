"""Replays of Token-Shuffle: windows, fused inputs, states, losses, schedules, greedy decoding."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.models.token_shuffle.model import TokenShuffle, cross_entropy
from tessellar.models.token_shuffle.official import from_config
from tessellar.parity.generation import schedule_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import take
from tessellar.protocol.guidance import (
    Constant,
    Cosine,
    Guidance,
    GuidanceSchedule,
    HalfCosine,
    HalfLinear,
    Linear,
)
from tessellar.protocol.layout import Categorical, grid_layout

READ = (
    "d layers heads kv_heads ffn window mlp_blocks mlp_ratio text_vocab boi eoi image_vocab image_vocab_start vocab "
    "grid rope rope_theta norm_eps cfg_max z_coefficient"
).split()
SCHEDULES = {
    "constant": Constant,
    "linear": Linear,
    "half-linear": HalfLinear,
    "cosine": Cosine,
    "half-cosine": HalfCosine,
}


def _generator(recording: Recording) -> TokenShuffle:
    """All recorded texts begin with the token that alone is the null text."""
    config = recording.options(read=READ, supported={"gelu": "erf"})
    height, width = config["grid"]
    layout = grid_layout(height, width, Categorical(config["image_vocab"]))
    text = next(name for name in sorted(recording.inputs) if name.startswith("text"))
    bos = int(recording.inputs[text][0])
    return from_config(recording.weights["model"], config, layout, bos=bos)


def _text(recording: Recording, sample: int) -> Condition:
    ids = recording.inputs[f"text{sample}"][None]
    return Condition(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))


def _codes(recording: Recording, sample: int) -> Tensor:
    return recording.inputs["codes"][sample : sample + 1]


def _schedule(settings: Mapping[str, Any]) -> GuidanceSchedule:
    return schedule_of(settings["schedule"], settings["cfg_max"], SCHEDULES)


@replays("token_shuffle", "shuffle")
def shuffle(recording: Recording) -> Outputs:
    """Windows of all samples, and the fused inputs and un-shuffled features of one."""
    generator = _generator(recording)
    entities = generator.entities
    sample = recording.settings("shuffle/fused")["sample"]
    codes = recording.inputs["codes"]
    first = torch.zeros(len(codes), dtype=torch.int64)
    tokens = entities.get(codes, first, entities.count)
    windows = rearrange(tokens, "b (m c) -> b m c", c=generator.codes)
    embedded = generator.token_embedding(windows[sample] + generator.offset)
    index = torch.arange(entities.count)[None]
    hidden = generator.hidden_states(_codes(recording, sample), _text(recording, sample))
    features = generator.unshuffle(hidden[0, -entities.count :])
    return {
        "windows": windows,
        "shuffle/concat": generator.shuffle.concatenate(embedded),
        "shuffle/fused": generator.embed(_codes(recording, sample), index, entities)[0],
        "unshuffle/features": features,
        "unshuffle/grid": take(features.flatten(0, 1)[None], entities.inverse[None])[0],
    }


@replays("token_shuffle", "sample*")
def samples(recording: Recording) -> Outputs:
    """States, logits over the joint vocabulary, and the parts of the loss of every sample."""
    generator = _generator(recording)
    outputs = {}
    for name, settings in recording.each("hidden*"):
        sample = settings["sample"]
        text = _text(recording, sample)
        codes = _codes(recording, sample)
        predicted = generator.predictions(codes, text)
        assert predicted.text_logits is not None and predicted.text_targets is not None
        of_text = cross_entropy(predicted.text_logits, predicted.text_targets)
        losses = generator.loss(codes, text)
        outputs |= {
            name: generator.hidden_states(codes, text, more=2)[0],
            f"image_logits{sample}": _tokenwise(generator, predicted.logits),
            f"loss/image{sample}": losses["cross_entropy"],
            f"loss/text{sample}": of_text.mean(),
            f"loss/z{sample}": losses.get("z", torch.zeros(())),
        }
    return outputs


def _tokenwise(generator: TokenShuffle, logits: Tensor) -> Tensor:
    """Logits [1, N, V] of windows as [windows, tokens of a window, V]."""
    return rearrange(logits[0], "(m c) v -> m c v", c=generator.codes)


@replays("token_shuffle", "cfg")
def schedules(recording: Recording) -> Outputs:
    """Scales of guidance over the windows."""
    entities = _generator(recording).entities
    number = torch.arange(entities.count)[None]
    runs = recording.each("cfg/*")
    return {name: _schedule(settings)(number, entities)[0] for name, settings in runs}


@replays("token_shuffle", "greedy_*")
def decoding(recording: Recording) -> Outputs:
    """Greedy codes of every recorded schedule, and the guided logits of single steps."""
    generator = _generator(recording)
    outputs = {}
    for name, settings in recording.each("greedy/*/codes"):
        text = _text(recording, settings["sample"])
        decoded = greedy(generator, text, Guidance(_schedule(settings)))
        windows = _tokenwise(generator, decoded.logits)
        outputs[name] = decoded.tokens[0]
        for logits, of_step in recording.each(name.replace("/codes", "/guided_logits*")):
            outputs[logits] = windows[of_step["step"]]
    return outputs
