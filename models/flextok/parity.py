"""Replays of what the official FlexAR generators gave (recordings of system `flextok_ar`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessellar.models.flextok.model import FlexAR
from tessellar.models.flextok.official import generator_from_official
from tessellar.parity.generation import predicted, scores_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout

READ = (
    "embed_dim num_heads depth qk_norm codebook_size num_tokens num_classes text_dim text_length "
    "cfg_factor"
).split()


def _generator(recording: Recording, part: str) -> FlexAR:
    config = recording.options(read=READ, supported={"pos_embed_type": "sincos1d"})
    state = recording.state(f"{part}/")
    kind = Categorical(config["codebook_size"])
    layout = sequence_layout(config["num_tokens"], kind, min_prefix=1)
    generator = generator_from_official(state, layout, config["num_heads"], config["text_length"])
    sizes = {
        "embed_dim": generator.positions.shape[1],
        "depth": len(generator.layers),
        "qk_norm": any(".q_norm." in key for key in state),
    }
    recording.check_sizes(sizes)
    return generator


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    factor = settings.get("cfg_factor")
    return NO_GUIDANCE if factor is None else Guidance(Constant(factor))


@replays("flextok_ar", "c2i")
def c2i(recording: Recording) -> Outputs:
    """Embeddings, logits, loss, greedy tokens with and without guidance, branches of a last token."""
    generator = _generator(recording, "c2i")
    tokens = recording.inputs["c2i/tokens"]
    label = recording.inputs["c2i/class"]
    none = label == recording.settings("c2i/class").get("uncond_label", -1)
    assert generator.num_classes is not None
    condition = Condition(ids=torch.where(none, generator.num_classes, label))
    scores = scores_of(generator, tokens, condition)
    index = torch.arange(generator.layout.length - 1)[None]
    behind = generator.embed(tokens, index, generator.entities)
    outputs = {
        "c2i/train_embeddings": torch.cat([generator.prefix(condition).embeddings, behind], dim=1),
        "c2i/train_logits": scores.logits,
        "c2i/ce": scores.cross_entropy(tokens),
        **branches(recording, generator, tokens),
    }
    for name, settings in recording.each("c2i/gen_logits_prefix*"):
        count = settings["prefix_length"] + 1
        outputs[name] = predicted(generator, tokens, condition, count)
    for name, settings in recording.each("c2i/greedy_*"):
        outputs[name] = greedy_of_labels(generator, settings)
    return outputs


def greedy_of_labels(generator: FlexAR, settings: Mapping[str, Any]) -> Tensor:
    """Official code guides the first token against one label and the later ones, all computed anew,
    against another.
    """
    condition = Condition(ids=torch.tensor(settings["classes"]))
    guidance = _guidance(settings)
    conditioning = generator.conditioning
    assert isinstance(conditioning, ClassConditioning)
    usual = conditioning.null_class

    def null_class(name: str) -> int:
        label = settings.get(name, -1)
        return usual if label == -1 else label

    conditioning.null_class = null_class("uncond_label_first")
    tokens = greedy(generator, condition, guidance, last=1).tokens
    conditioning.null_class = null_class("uncond_label_later")
    tokens = greedy(generator, condition, guidance, tokens, first=1).tokens
    conditioning.null_class = usual
    return tokens


def branches(recording: Recording, generator: FlexAR, tokens: Tensor) -> Outputs:
    """Continuations of a prefix, greedy but for the last token, which takes its most likely values."""
    settings = recording.settings("c2i/branch_tokens")
    condition = Condition(ids=torch.tensor(settings["classes"]))
    given = tokens[: condition.batch]
    first = settings["prefix_length"]
    end = first + settings["num_new_tokens"]
    decoded = greedy(generator, condition, _guidance(settings), given, first, end)
    likely = decoded.logits.log_softmax(-1)
    before = likely[:, :-1].max(-1).values.sum(-1)
    last = likely[:, -1].topk(settings["num_samples"])
    rows = decoded.tokens[:, :end].repeat_interleave(settings["num_samples"], 0)
    rows[:, -1] = last.indices.flatten()
    return {
        "c2i/branch_tokens": rows,
        "c2i/branch_logp": (before[:, None] + last.values).flatten()[:, None],
    }


@replays("flextok_ar", "t2i")
def t2i(recording: Recording) -> Outputs:
    """Projected text, logits, and greedy tokens guided against the empty prompt."""
    generator = _generator(recording, "t2i")
    features = recording.inputs["t2i/text_hidden"]
    valid = recording.inputs["t2i/text_mask"] > 0
    empty = recording.settings("t2i/text_hidden")["empty_prompt"]
    generator.set_empty_prompt(features[empty], valid[empty])
    everything = Condition(valid=valid, features=features)
    outputs = {
        "t2i/text_projected": generator.project_text(features),
        "t2i/train_logits": logits_of(generator.score(recording.inputs["t2i/tokens"], everything)),
    }
    for name, settings in recording.each("t2i/greedy_*"):
        condition = everything.select(torch.tensor(settings["prompts"]))
        outputs[name] = greedy(generator, condition, _guidance(settings)).tokens
    return outputs
