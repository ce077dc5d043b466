"""Replays of xAR's recorded outputs: a training pass, sampling with the recorded noise, orders of every X.

Cells, batch and steps are read from the recorded noise, guidance from the config.
"""

import re
from collections.abc import Iterable
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.models.xar.model import XAR, spread_times, time_index
from tessellar.models.xar.official import from_official
from tessellar.parity.recording import Recording
from tessellar.processes import flow
from tessellar.processes.flow import Flow, sde_times
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import cells, subsamples
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.protocol.layout import Continuous, Layout, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import ancestral
from tessellar.tokenizers.scale_pyramid.tokenizer import pyramid


class Given(Noise):
    """Recorded draws [B, *shape], one after the other."""

    def __init__(self, draws: Iterable[Tensor]) -> None:
        super().__init__([])
        self.draws = iter(draws)

    def normal(self, *shape: int) -> Tensor:
        drawn = next(self.draws)
        assert drawn.shape[1:] == shape, f"recorded noise {tuple(drawn.shape)} for {shape}"
        return drawn


class Calls:
    """Inputs and outputs of every network call, while it is attached to a generator."""

    def __init__(self, generator: XAR) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        generator.encoder.project.register_forward_pre_hook(self._before)
        generator.output.register_forward_hook(self._after)

    def _before(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.inputs.append(given[0])

    def _after(self, module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        self.outputs.append(result)


def train(recording: Recording) -> dict[str, Tensor]:
    """One training pass with recorded times and noise; gradients of the loss."""
    generator, inputs = _generator(recording, recording.inputs["train/noise"].shape[2]), recording.inputs
    generator.train()
    hidden: list[Tensor] = []
    generator.encoder.register_forward_hook(lambda *call: hidden.append(call[2]))
    outputs: list[Tensor] = []
    generator.output.register_forward_hook(lambda *call: outputs.append(call[2]))
    tokens = rearrange(inputs["train/latents"], "b c h w -> b (h w) c")
    noise = rearrange(inputs["train/noise"], "n b k c -> b (n k) c")
    t, dropped = inputs["train/t"].T, inputs["train/label_drop"].bool()
    condition = Condition(ids=inputs["train/labels"])
    condition = condition.where(~dropped, generator.null(condition))
    loss = generator.flow_loss(tokens, condition, t, noise)
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    x = generator.in_order(tokens)
    return {
        "train/entities": x,
        "train/noised_input": flow.interpolate(x, noise, spread_times(t, generator.entities)),
        "train/target": flow.target(x, noise),
        "train/time_embedding": generator.time_embedding(time_index(inputs["train/t"])),
        "train/encoder_out": hidden[0],
        "train/velocity": outputs[0],
        "train/loss": loss[None],
        "train/grad_norm": torch.nn.utils.get_total_norm(gradients)[None],
    }


@torch.no_grad()
def sample(recording: Recording) -> dict[str, Tensor]:
    """Latents of both solvers, with and without guidance, and single network calls of the guided SDE."""
    settings, x_t = recording.config["sampling"], recording.inputs["sample/x_T"]
    steps, guidance = settings["num_steps"], Guidance(Linear(settings["cfg"]))
    generator = _generator(recording, x_t.shape[2])
    calls = Calls(generator)
    outputs = {"sample/sde_latents": _latents(recording, generator, Flow(steps), guidance)}
    outputs |= _single_calls(recording, calls, steps)
    return {
        **outputs,
        "sample/sde_latents_nocfg": _latents(recording, generator, Flow(steps), NO_GUIDANCE),
        "sample/ode_latents": _latents(recording, generator, Flow(steps, "ode"), guidance),
        "sample/timestep_index": time_index(sde_times(steps)[:-1]).long(),
    }


def order(recording: Recording) -> dict[str, Tensor]:
    """Orders of cells and subsamples, and the resized latents of every scale."""
    latents = recording.inputs["train/latents"]
    layout, outputs = _layout(latents), {}
    for name in recording.names("output", {"order"}):
        side = int(found[0]) if (found := re.findall(r"\d+$", name)) else 0
        if "cell_k" in name:
            outputs[name] = cells(layout, side, side).order
        elif "subsample_d" in name:
            outputs[name] = subsamples(layout, side).order
        elif "scale" in name:
            listed = re.search(r"\[([\d, ]+)\]", recording.entries[name].meaning)
            sides = [int(n) for n in listed[1].split(",")] if listed else [latents.shape[-1]]
            outputs[name] = pyramid(latents, sides, "nearest")
    return outputs


def _layout(latents: Tensor) -> Layout:
    return grid_layout(latents.shape[2], latents.shape[3], Continuous(latents.shape[1]))


def _generator(recording: Recording, cell: int) -> XAR:
    config = recording.config
    layout, side = _layout(recording.inputs["train/latents"]), isqrt(cell)
    return from_official(
        recording.weights["model"],
        layout,
        config["encoder_num_heads"],
        f"cell:{side}",
        config.get("label_drop_prob", 0.1),
        config.get("proj_dropout", 0.1),
    )


def _latents(recording: Recording, generator: XAR, sampler: Flow, guidance: Guidance) -> Tensor:
    noise = []
    for number, first in enumerate(recording.inputs["sample/x_T"]):
        noise += [first, *(recording.inputs["sample/sde_noise"][number] if sampler.solver == "sde" else [])]
    condition = Condition(ids=recording.inputs["sample/labels"])
    tokens = ancestral(generator, condition, sampler, Given(noise), guidance)
    height = generator.layout.segments[0].shape[0]
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def _single_calls(recording: Recording, calls: Calls, steps: int) -> dict[str, Tensor]:
    """Outputs `cell<n>_call<i>_input` and `..._velocity`.

    The official first call of an entity reads the one before it and this one; ours reads them in two calls.
    """
    outputs = {}
    for name in recording.names("output", {"sample"}):
        if found := re.search(r"cell(\d+)_call(\d+)_(input|velocity)$", name):
            cell, call = int(found[1]), int(found[2])
            number = cell * (steps + 1) + call  # one more call an entity for its clean context, but for the first
            inputs = calls.inputs[number - 1 : number + 1] if call == 0 and cell else [calls.inputs[number]]
            outputs[name] = torch.cat(inputs, 1) if found[3] == "input" else calls.outputs[number]
    return outputs
