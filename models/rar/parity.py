"""Replays of what the official RAR gave (recordings of system `titok_rar`): scoring in any order,
prefixes, sampling.

Their last row of logits (behind the last token, unused) is what our generator predicts for an
entity past the end.
"""

import torch
from torch import Tensor

from tessellar.interop.options import check_options
from tessellar.models.rar.model import RAR
from tessellar.models.rar.official import from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, PowerCosine
from tessellar.protocol.layout import Categorical, sequence_layout

READ = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size image_seq_len codebook_size "
    "condition_num_classes generation"
).split()


def _generator(recording: Recording) -> RAR:
    config = recording.config
    check_options(config, "the config", READ)
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    return from_official(recording.weights["model"], layout)


def _condition(recording: Recording, name: str = "condition") -> Condition:
    """The recording holds rows of the embedding table: vocabulary, a mask token, classes, no class."""
    return Condition(ids=recording.inputs[name] - recording.config["codebook_size"] - 1)


def _logits(
    generator: RAR, tokens: Tensor, condition: Condition, entities: Entities, count: int
) -> Tensor:
    """Logits [B, count, V] of the first entities, given their predecessors; one may lie past the
    end.
    """
    state = generator.start(condition, entities=entities)
    return logits_of(generator.predict(state, tokens, count=count))


@replays("titok_rar", "gen_perm")
def any_order(recording: Recording) -> dict[str, Tensor]:
    """Scores of tokens in an order of its own for each image."""
    generator = _generator(recording)
    condition = _condition(recording)
    tokens = recording.inputs["tokens"]
    entities = Entities(recording.inputs["orders"], (1,) * generator.layout.length)
    labels = tokens.gather(1, entities.order)
    scores = generator.score(tokens, condition, entities)
    assert isinstance(scores, Logits)
    logits = _logits(generator, tokens, condition, entities, entities.count + 1)
    right = logits[:, :-1].argmax(-1) == labels
    return {
        "perm/labels": labels,
        "perm/logits": logits,
        "perm/loss": scores.cross_entropy(labels),
        "perm/accuracy": right.float().mean(),
    }


@replays("titok_rar", "gen_raster")
def raster(recording: Recording) -> dict[str, Tensor]:
    """Scores of tokens in raster order, with a class and without one."""
    generator = _generator(recording)
    tokens = recording.inputs["tokens"]
    entities = token_order(generator.layout)
    condition = Condition(ids=recording.inputs["class_ids"])
    null = generator.null(condition)
    recorded = _condition(recording, "none_condition").ids
    assert null.ids is not None and recorded is not None
    assert torch.equal(null.ids, recorded), "the null condition is another one"
    return {
        "raster/logits": _logits(generator, tokens, condition, entities, entities.count + 1),
        "raster/loss": generator.loss(tokens, condition)["cross_entropy"],
        "raster/logits_uncond": _logits(generator, tokens, null, entities, entities.count + 1),
    }


@replays("titok_rar", "gen_prefix")
def prefix(recording: Recording) -> dict[str, Tensor]:
    """Logits of the tokens of a prefix, and of the one behind it."""
    generator = _generator(recording)
    count = recording.settings("prefix/logits")["prefix_length"] + 1
    order = token_order(generator.layout)
    return {
        "prefix/logits": _logits(
            generator, recording.inputs["tokens"], _condition(recording), order, count
        )
    }


@replays("titok_rar", "gen_sample_*")
def sampling(recording: Recording) -> dict[str, Tensor]:
    """Greedy ids with a cache, and at each step the guided distribution at the run's temperature."""
    generator = _generator(recording)
    outputs = {}
    for name in recording.outputs("gen_*/ids"):
        settings = recording.settings(name)
        scale = settings["guidance_scale"]
        schedule = PowerCosine(scale, settings["guidance_scale_pow"], reach_end=False)
        guidance = Guidance(schedule) if scale else NO_GUIDANCE
        decoded = greedy(generator, _condition(recording), guidance)
        logits = decoded.logits / settings["randomize_temperature"]
        outputs[name] = decoded.tokens
        outputs[name.replace("/ids", "/probs")] = logits.softmax(-1)
    return outputs
