"""Replays of the generator of ReToK (cases `gen_*` of recordings of system `retok`)."""

from collections.abc import Mapping
from typing import Any

from tessellar.models.retok import ReToKGPT
from tessellar.models.retok.official import gpt_from_official
from tessellar.parity.generation import beside, guidance_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.guidance import Constant, Guidance, LateLinear, LateStep
from tessellar.protocol.layout import Categorical, sequence_layout

READ = "dim n_layer n_head block_size num_classes multiple_of vocab_size norm_eps".split()
OFF = 1.0001  # their scale where guidance is meant to be off


def _generator(recording: Recording) -> ReToKGPT:
    config = recording.options("gpt", READ, {"cls_token_num": 1})
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    return gpt_from_official(
        recording.weights["generator"],
        layout,
        num_heads=config["n_head"],
        multiple_of=config["multiple_of"],
        norm_eps=config.get("norm_eps", 1e-5),
    )


@replays("retok", "gen_train")
def scores(recording: Recording) -> Outputs:
    """Logits with the class and with the null class, and the loss."""
    generator = _generator(recording)
    tokens = recording.inputs["gpt/tokens"]
    condition = recording.classes("gpt/class_ids")
    return {
        "gpt/logits": logits_of(generator.score(tokens, condition)),
        "gpt/loss": generator.loss(tokens, condition)["cross_entropy"],
        "gpt/logits_uncond": logits_of(generator.score(tokens, generator.null(condition))),
    }


@replays("retok", "gen_*")
def decoding(recording: Recording) -> Outputs:
    """Greedy tokens and guided probabilities of every selected run."""
    generator = _generator(recording)
    condition = recording.classes("gpt/class_ids")
    outputs = {}
    for name, settings in recording.each("gpt/gen_*/ids"):
        decoded = greedy(generator, condition, _guidance(settings))
        outputs[name] = decoded.tokens
        outputs[beside(name, "probs")] = decoded.logits.softmax(-1)
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    schedules = {
        "constant": Constant,
        "step": lambda scale: LateStep(scale, settings.get("window_start", 0.18), between=OFF),
        "linear": lambda scale: LateLinear(scale, start=OFF),
        "linear_re": lambda scale: LateLinear(scale, start=OFF, falling=True),
    }
    scale = max(1.0, settings.get("cfg_scale", 1.0))  # theirs guides above 1 only
    return guidance_of(scale, settings.get("cfg_schedule", "constant"), schedules)
