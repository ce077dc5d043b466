"""Replays of the official MaskGIT generators (recordings of system `titok_maskgit`): logits, loss,
decoded tokens.

The cases of both backbones are alike: `gen_vit_*` and `gen_uvit_*`. Decoding consumes the recorded
uniform noise in the official order: tokens, then confidences, once a step.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tessellar.models.maskgit.model import MaskGIT
from tessellar.models.maskgit.official import from_official
from tessellar.parity.generation import power_cosine, schedule_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise
from tessellar.protocol.guidance import Constant, Guidance, Linear
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.sampling import confidence
from tessellar.sampling.settings import Sampling

READ = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size image_seq_len codebook_size "
    "condition_num_classes generation"
).split()


def _generator(recording: Recording, part: str) -> MaskGIT:
    config = recording.options(read=READ)
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    return from_official(recording.weights[part], layout, config["num_attention_heads"])


@replays("titok_maskgit", "gen_*_train")
def scores(recording: Recording) -> Outputs:
    """Logits with a class and without, loss and accuracy of masked tokens."""
    tokens = recording.inputs["tokens"]
    masked = recording.inputs["mask"] > 0
    hidden = recording.inputs["masked_tokens"]
    condition = recording.classes("class_ids")
    outputs = {}
    for name, settings in recording.each("*/mlm_loss"):
        part = name.partition("/")[0]
        generator = _generator(recording, part)
        generator.label_smoothing = settings["label_smoothing"]
        generator.known_weight = settings["loss_weight_unmasked_token"]
        with_masks = torch.where(masked, generator.vocab, tokens)
        assert torch.equal(hidden, with_masks), "other tokens are masked"
        outputs |= {
            name: generator.masked_loss(tokens, masked, condition),
            f"{part}/mlm_acc": generator.masked_accuracy(tokens, masked, condition),
            f"{part}/logits_cond": generator.logits(hidden, masked, condition),
            f"{part}/logits_uncond": generator.logits(hidden, masked, generator.null(condition)),
        }
    return outputs


@replays("titok_maskgit", "gen_*")
def decoding(recording: Recording) -> Outputs:
    """Tokens of every selected run."""
    outputs = {}
    for name, settings in recording.each("*/gen_*/ids"):
        run = name.removesuffix("/ids")
        of_tokens = recording.inputs[f"{run}/u_tokens"]
        of_confidences = recording.inputs[f"{run}/u_conf"]
        draws = []
        for step in range(len(of_tokens)):
            draws += [of_tokens[step], of_confidences[step]]
        algorithm = confidence.MaskGIT(
            steps=settings["num_sample_steps"],
            temperature=settings["randomize_temperature"],
            anneal=settings["softmax_temperature_annealing"],
        )
        outputs[name] = algorithm(
            _generator(recording, run.partition("/")[0]),
            recording.classes("class_ids"),
            settings=Sampling(),
            noise=RecordedNoise(draws),
            guidance=_guidance(settings),
        )
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    """Theirs is c + w (c - u) for `constant` and `linear`, so their w is ours less 1."""

    schedules = {
        "constant": lambda scale: Constant(scale + 1),
        "linear": lambda scale: Linear(scale + 1, start=1.0, reach_end=False),
        "power-cosine": lambda scale: power_cosine(settings),
    }
    kind = settings["guidance_decay"]
    return Guidance(schedule_of(kind, settings["guidance_scale"], schedules))
