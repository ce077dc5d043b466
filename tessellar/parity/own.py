"""Recordings of modules of this project's shape: a tokenizer, a generator, or both, whoever wrote
them.

`record_module` gives a module inputs and records what it makes of them; the replay builds the
module anew from its config (`--package` names a package that is not ours), fills it with the
recorded weights and does the same again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessellar.checkpoints.export import flatten
from tessellar.checkpoints.reading import Source
from tessellar.errors import UserError
from tessellar.parity.recorder import Recorder
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import GREEDY
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner, Condition, Conditioner
from tessellar.protocol.configured import Configured
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.text.conditioners import TextConditioner

SYSTEM = "own_module"
PROMPTS = ("a red circle", "two blue squares on a white ground")


@dataclass(frozen=True)
class Parts:
    """What there is of a model."""

    tokenizer: Tokenizer | None = None
    generator: Generator | None = None
    conditioner: Conditioner | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {name: module for name, module in vars(self).items() if module is not None}

    def condition(self, settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Condition:
        """Of recorded labels, or of recorded prompts."""
        if isinstance(self.conditioner, ClassConditioner):
            return self.conditioner.of_labels(inputs["sample/labels"])
        assert isinstance(self.conditioner, TextConditioner)
        return self.conditioner.of_texts(settings["prompts"])


def parts_of(module: nn.Module) -> Parts:
    """The parts of a module; raises UserError for what is neither a tokenizer nor a generator."""
    if isinstance(module, ImageGenerator):
        return Parts(module.tokenizer, module.generator, module.conditioner)
    if isinstance(module, Tokenizer):
        return Parts(module)
    if isinstance(module, Generator):
        return Parts(None, module, module.make_conditioner())
    raise UserError(
        f"{type(module).__name__} is neither a tokenizer nor a generator of this project's shape: record it by a "
        "function that takes a Recorder (tessellar/parity/recorder.py)"
    )


def record_module(module: nn.Module, count: int = 2, seed: int = 0) -> tuple[Recorder, list[str]]:
    """A recording of `count` images or samples, and the cases that were left out because chance
    enters them.

    Inputs are drawn from `seed`; the module is in eval mode, on the CPU, in float32.
    """
    module = module.cpu().float().eval()
    parts = parts_of(module)
    recorder = Recorder(
        SYSTEM, _config(parts), f"{type(module).__module__}.{type(module).__qualname__}"
    )
    recorder.weights("model", flatten(parts.modules()))
    left_out: list[str] = []
    inputs: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    if parts.tokenizer is not None:
        images = torch.rand(count, 3, *parts.tokenizer.image_size, generator=draw) * 2 - 1
        inputs["encode/images"] = recorder.input(
            "encode/images", images, "encode", "images in [-1, 1]"
        )
        made = _record(recorder, parts, "encode", inputs, {}, left_out)
        if "encode/tokens" in made:
            inputs["decode/tokens"] = recorder.input(
                "decode/tokens", made["encode/tokens"], "decode", "tokens"
            )
            _record(recorder, parts, "decode", inputs, {}, left_out)
    if parts.generator is not None:
        settings = record_conditions(recorder, parts, inputs, count, draw)
        made = _record(recorder, parts, "sample", inputs, settings, left_out)
        if "sample/tokens" in made:
            inputs["loss/tokens"] = recorder.input(
                "loss/tokens", made["sample/tokens"], "loss", "tokens"
            )
            _record(recorder, parts, "loss", inputs, settings, left_out)
    return recorder, left_out


def _config(parts: Parts) -> dict[str, Any]:
    described = {}
    for name, module in parts.modules().items():
        assert isinstance(module, Configured)
        described[name] = module.config
    return described


def record_conditions(
    recorder: Recorder, parts: Parts, inputs: dict[str, Tensor], count: int, draw: torch.Generator
) -> dict[str, Any]:
    """Labels among the inputs and seeds of samples, or prompts as settings of both cases."""
    inputs["sample/seeds"] = recorder.input(
        "sample/seeds", torch.arange(count), "sample", "seed of each sample"
    )
    if isinstance(parts.conditioner, ClassConditioner):
        labels = torch.randint(parts.conditioner.num_classes, (count,), generator=draw)
        inputs["sample/labels"] = recorder.input("sample/labels", labels, "sample", "class ids")
        return {}
    if not isinstance(parts.conditioner, TextConditioner):
        raise UserError(
            f"a {type(parts.conditioner).__name__} reads neither class ids nor texts: nothing to record"
        )
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    for case in ("sample", "loss"):
        recorder.settings(case, prompts=prompts)
    return {"prompts": prompts}


def _record(
    recorder: Recorder,
    parts: Parts,
    case: str,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    left_out: list[str],
) -> dict[str, Tensor]:
    """Run a case twice; outputs that are the same both times are recorded and returned, others left
    out.
    """
    first = run_case(parts, case, inputs, settings)
    second = run_case(parts, case, inputs, settings)
    kept = {}
    for name, tensor in first.items():
        if torch.equal(tensor, second[name]):
            recorder.output(name, tensor, case)
            kept[name] = tensor
        else:
            left_out.append(name)
    return kept


@torch.no_grad()
def run_case(
    parts: Parts, case: str, inputs: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the parts make of the inputs of a case."""
    if case == "encode":
        assert parts.tokenizer is not None
        return {"encode/tokens": parts.tokenizer.encode(inputs["encode/images"])}
    if case == "decode":
        assert parts.tokenizer is not None
        return {"decode/images": parts.tokenizer.decode(inputs["decode/tokens"])}
    assert parts.generator is not None
    condition = parts.condition(settings, inputs)
    # The most likely tokens, or (of continuous tokens) those of the seeds.
    if case == "sample":
        return {
            "sample/tokens": GREEDY.tokens(
                parts.generator, condition, inputs["sample/seeds"].tolist()
            )
        }
    losses = parts.generator.loss(inputs["loss/tokens"], condition)
    return {f"loss/{name}": loss for name, loss in losses.items()}


def rebuilt(recording: Recording) -> Parts:
    """The recorded module, made anew; raises UserError for a class of a package that is not
    trusted.
    """
    source = Source(str(recording.folder), recording.config, dict(recording.weights["model"]), "")
    found = {}
    for name in ("tokenizer", "generator", "conditioner"):
        if name in recording.config:
            found[name] = source.build(name)
    if len(found) == 3:
        return parts_of(ImageGenerator(**found).eval())
    return Parts(**found)


@replays(SYSTEM, "encode", "decode", "sample", "loss")
def replay(recording: Recording) -> dict[str, Tensor]:
    """The recorded cases again."""
    parts = rebuilt(recording)
    outputs: dict[str, Tensor] = {}
    for case in ("encode", "decode", "sample", "loss"):
        if case in recording.cases:
            settings = recording.case_settings.get(case, {})
            made = run_case(parts, case, recording.inputs, settings)
            recorded = recording.names("output", {case})
            for name in made.keys() & set(recorded):
                outputs[name] = made[name]
    return outputs
