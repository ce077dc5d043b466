"""HAR's checkpoints (arXiv 2601.03955), official keys to ours and back, and the recorded outputs of the generator."""

import re

import torch
from torch import Tensor

from tessellar.models.har.model import HAR
from tessellar.models.har.official import from_official
from tessellar.models.llamagen.parity import greedy
from tessellar.parity.recording import Recording
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Linear, Step
from tessellar.protocol.layout import Categorical, sequence_layout

OFF = 1.0001  # what the official schedules take where guidance is off


def recorded_generator(recording: Recording) -> HAR:
    """Our generator with the recorded weights."""
    config = recording.config["generator"]
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    sizes = (config["n_head"], config["ar_token_num"], config["norm_eps"], config["rope_base"])
    return from_official(recording.weights["generator"], layout, *sizes)


def scores(recording: Recording, tokens: Tensor) -> dict[str, Tensor]:
    """Mask, logits and loss of the tokens that the tokenizer gives."""
    generator, condition = recorded_generator(recording), Condition(ids=recording.inputs["har_cond"])
    place = torch.arange(generator.layout.length)
    number = generator.block(place)
    visible = (number[None] <= number[:, None]).to(torch.uint8)
    with torch.no_grad():
        predicted = generator.score(tokens, condition)
        assert isinstance(predicted, Logits)
        return {"har_mask": visible, "har_logits": predicted.logits, "har_loss": predicted.cross_entropy(tokens)}


def greedy_runs(recording: Recording) -> dict[str, Tensor]:
    """Tokens and guided logits of every greedy run of the selected cases."""
    generator, condition = recorded_generator(recording), Condition(ids=recording.inputs["har_cond"])
    outputs = {}
    for name in recording.names("output", recording.cases):
        if name.startswith("har_greedy_") and f"{name}_logits" in recording.entries:
            outputs[name], outputs[f"{name}_logits"] = greedy(generator, condition, _guidance(recording, name))
    return outputs


def _guidance(recording: Recording, name: str) -> Guidance:
    """Scale, schedule and its start stand in the meaning; progress is s / (S - 1)."""
    said = recording.meanings[name]
    scale, kind = re.search(r"cfg_scale ([\d.]+\d)", said), re.search(r"schedule (\w+)", said)
    assert scale is not None and kind is not None, "the meaning says scale and schedule"
    full, steps = float(scale[1]), recording.config["generator"]["num_steps"]
    if full == 1.0:
        return NO_GUIDANCE
    if kind[1] == "constant":
        return Guidance(Constant(full))
    if kind[1] == "linear":
        return Guidance(Linear(full + OFF - 1, OFF))
    start = re.search(r"'window_start': ([\d.]+\d)", said)
    share = float(start[1]) if start else 0.0
    return Guidance(Step(full, next(s for s in range(steps) if s / (steps - 1) >= share), OFF))


def filters(recording: Recording) -> dict[str, Tensor]:
    """Which logits top-k and top-p remove."""
    logits, outputs = recording.inputs["filter_in"], {}
    for name in recording.names("output", {"gen_filter"}):
        said = recording.meanings[name]
        top_k, top_p = re.search(r"top_k=(\d+)", said), re.search(r"top_p=(0?\.\d+)", said)
        choice = Choice(top_k=int(top_k[1]) if top_k else 0, top_p=float(top_p[1]) if top_p else 1.0)
        outputs[name] = (choice.probs(logits) == 0).to(torch.uint8)
    return outputs
