"""Replays of HAR, the generator over ResTok's tokens (cases `gen_*` of recordings of system
`restok`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.models.har.model import HAR
from tessellar.models.har.official import from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import choice_of, greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Linear, Step
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.tokenizers.restok.parity import recorded_images, recorded_tokenizer

OFF = 1e-4  # their schedules lie this much above the scale that they name


READ = (
    "dim n_layer n_head multiple_of norm_eps rope_base vocab_size block_size num_classes ar_token_num spe_token_num "
    "class_dropout_prob all_dropouts num_steps"
).split()


def _generator(recording: Recording) -> HAR:
    config = recording.config["generator"]
    check_options(config, "the config's generator", READ, {"cls_token_num": 1})
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    return from_official(
        recording.weights["generator"],
        layout,
        num_heads=config["n_head"],
        first=config["ar_token_num"],
        norm_eps=config["norm_eps"],
        rope_base=config["rope_base"],
    )


@replays("restok", "gen_train")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Mask, logits and loss of the tokens that the tokenizer gives."""
    generator = _generator(recording)
    condition = Condition(ids=recording.inputs["har_cond"])
    tokens = recorded_tokenizer(recording).encode(recorded_images(recording))
    predicted = generator.score(tokens, condition)
    assert isinstance(predicted, Logits)
    level = generator.block(torch.arange(generator.layout.length))
    visible = level[None] <= level[:, None]
    return {
        "har_mask": visible.to(torch.uint8),
        "har_logits": predicted.logits,
        "har_loss": predicted.cross_entropy(tokens),
    }


@replays("restok", "gen_greedy_*")
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Tokens and guided logits of every greedy run, and the images of those that have one."""
    generator = _generator(recording)
    condition = Condition(ids=recording.inputs["har_cond"])
    outputs = {}
    for logits in recording.outputs("har_greedy_*_logits"):
        run = logits.removesuffix("_logits")
        decoded = greedy(generator, condition, _guidance(recording.settings(run)))
        outputs[run] = decoded.tokens
        outputs[logits] = decoded.logits
    for image in recording.outputs("har_greedy_*_image"):
        images = recorded_tokenizer(recording).decode(outputs[image.removesuffix("_image")])
        outputs[image] = (images + 1) / 2
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    """Progress is s / (S - 1) over the S steps."""
    scale = settings["cfg_scale"]
    schedule = settings["cfg_schedule"]
    least = settings.get("min_cfg_scale", 1.0) + OFF
    if scale == 1.0:
        return NO_GUIDANCE
    if schedule == "constant":
        return Guidance(Constant(scale))
    if schedule == "linear":
        return Guidance(Linear(scale + OFF, start=least))
    if schedule == "step":
        steps = settings["num_steps"]
        share = settings.get("window_start", 0.0)
        first = next(step for step in range(steps) if step / (steps - 1) >= share)
        return Guidance(Step(scale, first, before=least))
    raise UserError(f"the guidance schedule {schedule!r} of this recording is not known")


@replays("restok", "gen_filter")
def filters(recording: Recording) -> dict[str, Tensor]:
    """Which logits top-k and top-p remove."""
    logits = recording.inputs["filter_in"]
    outputs = {}
    for name in recording.outputs("filter_*"):
        kept = choice_of(recording.settings(name)).probs(logits) > 0
        outputs[name] = (~kept).to(torch.uint8)
    return outputs
