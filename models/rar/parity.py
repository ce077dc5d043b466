"""Replays of RAR (recordings of system `titok_rar`): scores in any order, prefixes, sampling."""

import torch
from torch import Tensor

from tessellar.models.rar.model import RAR
from tessellar.models.rar.official import from_official
from tessellar.parity.generation import accuracy, beside, by_power_cosine, past_the_end, predicted
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.layout import Categorical, sequence_layout

READ = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size image_seq_len codebook_size "
    "condition_num_classes generation"
).split()


def _generator(recording: Recording) -> RAR:
    config = recording.options(read=READ)
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    return from_official(recording.weights["model"], layout)


def _condition(recording: Recording, name: str = "condition") -> Condition:
    """The recording holds rows of the embedding table: vocabulary, a mask token, classes, no class."""
    return Condition(ids=recording.inputs[name] - recording.config["codebook_size"] - 1)


@replays("titok_rar", "gen_perm")
def any_order(recording: Recording) -> Outputs:
    """Scores of tokens in an order of its own for each image."""
    generator = _generator(recording)
    tokens = recording.inputs["tokens"]
    entities = Entities(recording.inputs["orders"], (1,) * generator.layout.length)
    labels = tokens.gather(1, entities.order)
    logits = past_the_end(generator, tokens, _condition(recording), entities)
    return {
        "perm/labels": labels,
        "perm/logits": logits,
        "perm/loss": Logits(logits[:, :-1]).cross_entropy(labels),
        "perm/accuracy": accuracy(logits[:, :-1], labels),
    }


@replays("titok_rar", "gen_raster")
def raster(recording: Recording) -> Outputs:
    """Scores of tokens in raster order, with a class and without one."""
    generator = _generator(recording)
    tokens = recording.inputs["tokens"]
    condition = recording.classes("class_ids")
    null = generator.null(condition)
    recorded = _condition(recording, "none_condition")
    assert null.ids is not None and recorded.ids is not None
    assert torch.equal(null.ids, recorded.ids), "the null condition is another one"
    return {
        "raster/logits": past_the_end(generator, tokens, condition),
        "raster/loss": generator.loss(tokens, condition)["cross_entropy"],
        "raster/logits_uncond": past_the_end(generator, tokens, null),
    }


@replays("titok_rar", "gen_prefix")
def prefix(recording: Recording) -> Outputs:
    """Logits of the tokens of a prefix, and of the one behind it."""
    generator = _generator(recording)
    count = recording.settings("prefix/logits")["prefix_length"] + 1
    tokens = recording.inputs["tokens"]
    return {"prefix/logits": predicted(generator, tokens, _condition(recording), count)}


@replays("titok_rar", "gen_sample_*")
def sampling(recording: Recording) -> Outputs:
    """Greedy ids with a cache, and at each step the guided distribution at the run's temperature."""
    generator = _generator(recording)
    outputs: dict[str, Tensor] = {}
    for name, settings in recording.each("gen_*/ids"):
        decoded = greedy(generator, _condition(recording), by_power_cosine(settings))
        logits = decoded.logits / settings["randomize_temperature"]
        outputs[name] = decoded.tokens
        outputs[beside(name, "probs")] = logits.softmax(-1)
    return outputs
