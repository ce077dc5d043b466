"""Replays of the official MaskGIT generators (recordings of system `titok_maskgit`): logits, loss,
decoded tokens.

The cases of both backbones are alike: `gen_vit_*` and `gen_uvit_*`. Decoding consumes the recorded
uniform noise in the official order: tokens, then confidences, once a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.models.maskgit.model import MaskGIT
from tessellar.models.maskgit.official import from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Guidance, Linear, PowerCosine
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.sampling import confidence
from tessellar.sampling.settings import Sampling

READ = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size image_seq_len codebook_size "
    "condition_num_classes generation"
).split()


def _generator(recording: Recording, part: str) -> MaskGIT:
    config = recording.config
    check_options(config, "the config", READ)
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    return from_official(recording.weights[part], layout, config["num_attention_heads"])


@replays("titok_maskgit", "gen_*_train")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Logits with a class and without, loss and accuracy of masked tokens."""
    tokens = recording.inputs["tokens"]
    masked = recording.inputs["mask"] > 0
    hidden = recording.inputs["masked_tokens"]
    condition = Condition(ids=recording.inputs["class_ids"])
    outputs = {}
    for name in recording.outputs("*/mlm_loss"):
        part = name.partition("/")[0]
        settings = recording.settings(name)
        generator = _generator(recording, part)
        generator.label_smoothing = settings["label_smoothing"]
        generator.known_weight = settings["loss_weight_unmasked_token"]
        assert torch.equal(hidden, torch.where(masked, generator.vocab, tokens)), (
            "other tokens are masked"
        )
        outputs |= {
            name: generator.masked_loss(tokens, masked, condition),
            f"{part}/mlm_acc": generator.masked_accuracy(tokens, masked, condition),
            f"{part}/logits_cond": generator.logits(hidden, masked, condition),
            f"{part}/logits_uncond": generator.logits(hidden, masked, generator.null(condition)),
        }
    return outputs


@replays("titok_maskgit", "gen_*")
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Tokens of every selected run."""
    outputs = {}
    for name in recording.outputs("*/gen_*/ids"):
        run = name.removesuffix("/ids")
        settings = recording.settings(name)
        draws = []
        for of_tokens, of_confidences in zip(
            recording.inputs[f"{run}/u_tokens"], recording.inputs[f"{run}/u_conf"], strict=True
        ):
            draws += [of_tokens, of_confidences]
        algorithm = confidence.MaskGIT(
            steps=settings["num_sample_steps"],
            temperature=settings["randomize_temperature"],
            anneal=settings["softmax_temperature_annealing"],
        )
        outputs[name] = algorithm(
            _generator(recording, run.partition("/")[0]),
            Condition(ids=recording.inputs["class_ids"]),
            settings=Sampling(),
            noise=RecordedNoise(draws),
            guidance=_guidance(settings),
        )
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    """Theirs is c + w (c - u) for `constant` and `linear`, so their w is ours less 1."""
    kind = settings["guidance_decay"]
    scale = settings["guidance_scale"]
    if kind == "constant":
        return Guidance(Constant(scale + 1))
    if kind == "linear":
        return Guidance(Linear(scale + 1, start=1.0, reach_end=False))
    if kind == "power-cosine":
        return Guidance(PowerCosine(scale, settings["guidance_scale_pow"], reach_end=False))
    raise UserError(
        f"guidance_decay {kind!r} is not known; there are constant, linear, power-cosine"
    )
