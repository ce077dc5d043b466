"""Replay of what the official RAR gave (recordings of system `titok_rar`): scoring in any order, prefixes, sampling.

Their last row of logits (behind the last token, unused) is what our generator predicts for an entity past the end.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.models.rar.model import RAR
from tessellar.models.rar.official import from_official
from tessellar.parity.recording import Recording
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.guidance import Guidance, PowerCosine
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from


@torch.no_grad()
def rar(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    for name in recording.names("output", recording.cases):
        if name.endswith("/ids"):
            outputs |= _sampled(recording, name.removesuffix("/ids"))
    return outputs


def _generator(recording: Recording) -> RAR:
    config = recording.config
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    return from_official(recording.weights["model"], layout)


def _condition(recording: Recording, name: str = "condition") -> Condition:
    """The recording holds rows of the embedding table: vocabulary, a mask token, classes, no class."""
    return Condition(ids=recording.inputs[name] - recording.config["codebook_size"] - 1)


def _logits(generator: RAR, tokens: Tensor, condition: Condition, entities: Entities, count: int) -> Tensor:
    """Logits [B, count, V] of the first entities, given their predecessors; one may lie past the end."""
    state = generator.start(condition, entities=entities)
    predicted = generator.predict(state, tokens, count=count)
    assert isinstance(predicted, Logits)
    return predicted.logits


def _loss(generator: RAR, tokens: Tensor, condition: Condition, entities: Entities, targets: Tensor) -> Tensor:
    scores = generator.score(tokens, condition, entities)
    assert isinstance(scores, Logits)
    return scores.cross_entropy(targets)


def _permuted(recording: Recording) -> dict[str, Tensor]:
    generator, condition, tokens = _generator(recording), _condition(recording), recording.inputs["tokens"]
    entities = Entities(recording.inputs["orders"], (1,) * generator.layout.length)
    labels = tokens.gather(1, entities.order)
    logits = _logits(generator, tokens, condition, entities, entities.count + 1)
    right = logits[:, :-1].argmax(-1) == labels
    return {
        "perm/labels": labels,
        "perm/logits": logits,
        "perm/loss": _loss(generator, tokens, condition, entities, labels),
        "perm/accuracy": right.float().mean(),
    }


def _raster(recording: Recording) -> dict[str, Tensor]:
    generator, tokens = _generator(recording), recording.inputs["tokens"]
    entities, condition = token_order(generator.layout), Condition(ids=recording.inputs["class_ids"])
    null = _condition(recording, "none_condition")
    assert null.ids is not None and bool((null.ids == generator.null(condition).ids).all())
    return {
        "raster/logits": _logits(generator, tokens, condition, entities, entities.count + 1),
        "raster/loss": generator.loss(tokens, condition)["cross_entropy"],
        "raster/logits_uncond": _logits(generator, tokens, null, entities, entities.count + 1),
    }


def _prefix(recording: Recording) -> dict[str, Tensor]:
    generator = _generator(recording)
    count = recording.entries["prefix/logits"].shape[1]
    arguments = (recording.inputs["tokens"], _condition(recording), token_order(generator.layout), count)
    return {"prefix/logits": _logits(generator, *arguments)}


CASES = {"gen_perm": _permuted, "gen_raster": _raster, "gen_prefix": _prefix}


def _sampled(recording: Recording, run: str) -> dict[str, Tensor]:
    """Greedy ids with a cache, and at each step the guided distribution at the run's temperature."""
    generator, condition = _generator(recording), _condition(recording)
    settings = recording.config["generation"][run.removeprefix("gen_")]
    scale, power = settings["guidance_scale"], settings["guidance_scale_pow"]
    guidance = Guidance(PowerCosine(scale, power, reach_end=False) if scale else None)
    state, tokens = generator.start(condition, guidance), generator.layout.blank(condition.batch)
    probabilities = []
    for step in decode_from(generator, state, Choice(temperature=0.0), Noise(range(condition.batch)), tokens):
        assert isinstance(step.distribution, Logits)
        probabilities.append(F.softmax(step.distribution.logits / settings["randomize_temperature"], -1))
        tokens = step.tokens
    return {f"{run}/ids": tokens, f"{run}/probs": torch.cat(probabilities, 1)}
