"""Replays of the generator of ReToK (cases `gen_*` of recordings of system `retok`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.models.retok import ReToKGPT
from tessellar.models.retok.official import gpt_from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, LateLinear, LateStep
from tessellar.protocol.layout import Categorical, sequence_layout

OFF = 1.0001  # their scale where guidance is meant to be off


READ = "dim n_layer n_head block_size num_classes multiple_of vocab_size norm_eps".split()


def _generator(recording: Recording) -> ReToKGPT:
    config = recording.config["gpt"]
    check_options(config, "the config's gpt", READ, {"cls_token_num": 1})
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    return gpt_from_official(
        recording.weights["generator"],
        layout,
        num_heads=config["n_head"],
        multiple_of=config["multiple_of"],
        norm_eps=config.get("norm_eps", 1e-5),
    )


@replays("retok", "gen_train")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Teacher-forced logits with the class and with the null class, and the loss."""
    generator = _generator(recording)
    tokens = recording.inputs["gpt/tokens"]
    condition = Condition(ids=recording.inputs["gpt/class_ids"])
    return {
        "gpt/logits": logits_of(generator.score(tokens, condition)),
        "gpt/loss": generator.loss(tokens, condition)["cross_entropy"],
        "gpt/logits_uncond": logits_of(generator.score(tokens, generator.null(condition))),
    }


@replays("retok", "gen_*")
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Greedy tokens and guided probabilities of every selected run."""
    generator = _generator(recording)
    condition = Condition(ids=recording.inputs["gpt/class_ids"])
    outputs = {}
    for name in recording.outputs("gpt/gen_*/ids"):
        decoded = greedy(generator, condition, _guidance(recording.settings(name)))
        outputs[name] = decoded.tokens
        outputs[name.replace("/ids", "/probs")] = decoded.logits.softmax(-1)
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    scale = settings.get("cfg_scale", 1.0)
    schedule = settings.get("cfg_schedule", "constant")
    if scale <= 1:
        return NO_GUIDANCE
    if schedule == "constant":
        return Guidance(Constant(scale))
    if schedule == "step":
        return Guidance(LateStep(scale, start=settings.get("window_start", 0.18), between=OFF))
    if schedule in ("linear", "linear_re"):
        return Guidance(LateLinear(scale, start=OFF, falling=schedule == "linear_re"))
    raise UserError(f"the guidance schedule {schedule!r} of this recording is not known")
