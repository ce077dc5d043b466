"""Replays of HAR, the generator over ResTok's tokens (cases `gen_*` of system `restok`)."""

from collections.abc import Mapping
from typing import Any

import torch

from tessellar.models.har.model import HAR
from tessellar.models.har.official import from_official
from tessellar.parity.forms import from_unit, to_unit
from tessellar.parity.generation import filtered, guidance_of, scores_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.guidance import Constant, Guidance, Linear, Step
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.tokenizers.restok.parity import recorded_tokenizer

READ = (
    "dim n_layer n_head multiple_of norm_eps rope_base vocab_size block_size num_classes ar_token_num spe_token_num "
    "class_dropout_prob all_dropouts num_steps"
).split()
OFF = 1e-4  # their schedules lie this much above the scale that they name


def recorded_generator(recording: Recording) -> HAR:
    """Our generator with the recorded weights and options."""
    config = recording.options("generator", READ, {"cls_token_num": 1})
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    made = from_official(
        recording.weights["generator"],
        layout,
        num_heads=config["n_head"],
        first=config["ar_token_num"],
        norm_eps=config["norm_eps"],
        rope_base=config["rope_base"],
        condition_dropout=config.get("class_dropout_prob", 0.1),
        dropout=config.get("all_dropouts", 0.1),
    )
    sizes = {"spe_token_num": made.special_embedding.num_embeddings}
    recording.check_sizes(sizes, "generator")
    return made


@replays("restok", "gen_train")
def scores(recording: Recording) -> Outputs:
    """Mask, logits and loss of the tokens that the tokenizer gives."""
    generator = recorded_generator(recording)
    tokens = recorded_tokenizer(recording).encode(from_unit(recording.inputs["image"]))
    found = scores_of(generator, tokens, recording.classes("har_cond"))
    level = generator.block(torch.arange(generator.layout.length))
    visible = level[None] <= level[:, None]
    return {
        "har_mask": visible.to(torch.uint8),
        "har_logits": found.logits,
        "har_loss": found.cross_entropy(tokens),
    }


@replays("restok", "gen_greedy_*")
def decoding(recording: Recording) -> Outputs:
    """Tokens and guided logits of every greedy run, and the images of those that have one."""
    generator = recorded_generator(recording)
    condition = recording.classes("har_cond")
    outputs = {}
    for logits in recording.outputs("har_greedy_*_logits"):
        run = logits.removesuffix("_logits")
        decoded = greedy(generator, condition, _guidance(recording.settings(run)))
        outputs[run] = decoded.tokens
        outputs[logits] = decoded.logits
    for image in recording.outputs("har_greedy_*_image"):
        tokens = outputs[image.removesuffix("_image")]
        outputs[image] = to_unit(recorded_tokenizer(recording).decode(tokens))
    return outputs


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    """Progress is s / (S - 1) over the S steps."""
    least = settings.get("min_cfg_scale", 1.0) + OFF

    def step(scale: float) -> Step:
        steps = settings["num_steps"]
        share = settings.get("window_start", 0.0)
        first = next(step for step in range(steps) if step / (steps - 1) >= share)
        return Step(scale, first, before=least)

    def linear(scale: float) -> Linear:
        return Linear(scale + OFF, start=least)

    schedules = {"constant": Constant, "linear": linear, "step": step}
    return guidance_of(settings["cfg_scale"], settings["cfg_schedule"], schedules)


@replays("restok", "gen_filter")
def filters(recording: Recording) -> Outputs:
    """Which logits top-k and top-p remove."""
    found = filtered(recording, "filter_*", logits="filter_in")
    return {name: (probs == 0).to(torch.uint8) for name, probs in found.items()}
