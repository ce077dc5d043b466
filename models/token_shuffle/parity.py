"""Replays of Token-Shuffle's recorded outputs: windows, fused inputs, states, losses, schedules,
greedy decoding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.models.token_shuffle.model import TokenShuffle, cross_entropy
from tessellar.models.token_shuffle.official import from_config
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import take
from tessellar.protocol.guidance import (
    Constant,
    Cosine,
    Guidance,
    HalfCosine,
    HalfLinear,
    Linear,
    Schedule,
)
from tessellar.protocol.layout import Categorical, grid_layout

SCHEDULES: dict[str, type] = {
    "constant": Constant,
    "linear": Linear,
    "half-linear": HalfLinear,
    "cosine": Cosine,
    "half-cosine": HalfCosine,
}


READ = (
    "d layers heads kv_heads ffn window mlp_blocks mlp_ratio text_vocab boi eoi image_vocab image_vocab_start vocab "
    "grid rope rope_theta norm_eps cfg_max z_coefficient"
).split()


def _generator(recording: Recording) -> TokenShuffle:
    """All recorded texts begin with the token that alone is the null text."""
    config = recording.config
    check_options(config, "the config", READ, {"gelu": "erf"})
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


def _schedule(settings: Mapping[str, Any]) -> Schedule:
    name = settings["schedule"]
    if name not in SCHEDULES:
        raise UserError(
            f"the guidance schedule {name!r} is not known; there are {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[name](settings["cfg_max"])


@replays("token_shuffle", "shuffle")
def shuffle(recording: Recording) -> dict[str, Tensor]:
    """Windows of all samples, and the fused inputs and un-shuffled features of one."""
    generator = _generator(recording)
    sample = recording.settings("shuffle/fused")["sample"]
    entities = generator.entities
    codes = recording.inputs["codes"]
    first = torch.zeros(len(codes), dtype=torch.int64)
    windows = rearrange(
        entities.get(codes, first, entities.count), "b (m c) -> b m c", c=generator.codes
    )
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
def samples(recording: Recording) -> dict[str, Tensor]:
    """States, logits over the joint vocabulary, and the parts of the loss of every sample."""
    generator = _generator(recording)
    outputs = {}
    for name in recording.outputs("hidden*"):
        sample = recording.settings(name)["sample"]
        text = _text(recording, sample)
        codes = _codes(recording, sample)
        predicted = generator.predictions(codes, text)
        assert predicted.text_logits is not None and predicted.text_targets is not None
        losses = generator.loss(codes, text)
        outputs |= {
            name: generator.hidden_states(codes, text, more=2)[0],
            f"image_logits{sample}": rearrange(
                predicted.logits[0], "(m c) v -> m c v", c=generator.codes
            ),
            f"loss/image{sample}": losses["cross_entropy"],
            f"loss/text{sample}": cross_entropy(
                predicted.text_logits, predicted.text_targets
            ).mean(),
            f"loss/z{sample}": losses.get("z", torch.zeros(())),
        }
    return outputs


@replays("token_shuffle", "cfg")
def schedules(recording: Recording) -> dict[str, Tensor]:
    """Scales of guidance over the windows."""
    entities = _generator(recording).entities
    number = torch.arange(entities.count)[None]
    names = recording.outputs("cfg/*")
    return {name: _schedule(recording.settings(name))(number, entities)[0] for name in names}


@replays("token_shuffle", "greedy_*")
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Greedy codes of every recorded schedule, and the guided logits of single steps."""
    generator = _generator(recording)
    outputs = {}
    for name in recording.outputs("greedy/*/codes"):
        settings = recording.settings(name)
        decoded = greedy(
            generator, _text(recording, settings["sample"]), Guidance(_schedule(settings))
        )
        steps = rearrange(decoded.logits[0], "(m c) v -> m c v", c=generator.codes)
        outputs[name] = decoded.tokens[0]
        for logits in recording.outputs(name.replace("/codes", "/guided_logits*")):
            outputs[logits] = steps[recording.settings(logits)["step"]]
    return outputs
