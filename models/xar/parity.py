"""Replays of xAR: a training pass, sampling with the recorded noise, orders of every X."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import require
from tessellar.models.xar.model import XAR, spread_times, time_index
from tessellar.models.xar.official import from_official
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.generation import guidance_of, with_dropped
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Calls, RecordedNoise, gradient_norm
from tessellar.processes import flow
from tessellar.processes.flow import Euler, EulerMaruyama, sde_times
from tessellar.protocol.entities import cells, subsamples
from tessellar.protocol.guidance import Constant, Guidance, Linear
from tessellar.protocol.layout import Continuous, Layout, grid_layout
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.scale_pyramid.tokenizer import pyramid

READ = (
    "img_size vae_stride vae_embed_dim encoder_embed_dim encoder_depth encoder_num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads mlp_ratio label_drop_prob class_num attn_dropout proj_dropout clusters sampling"
).split()
SOLVERS = {"euler_maruyama_sampler": EulerMaruyama, "euler_sampler": Euler}


def _layout(latents: Tensor) -> Layout:
    return grid_layout(latents.shape[2], latents.shape[3], Continuous(latents.shape[1]))


def _generator(recording: Recording) -> XAR:
    """X is a cell; the latents divide into `clusters` of them."""
    config = recording.options(read=READ, supported={"patch_size": 1})
    # One rate of dropout serves attention and projections.
    require(config, "the config", {"attn_dropout": config["proj_dropout"]})
    for option in ("embed_dim", "num_heads"):
        if config[f"encoder_{option}"] != config[f"decoder_{option}"]:
            raise UserError(
                f"xAR has one {option} here: encoder_{option} and decoder_{option} must be equal"
            )
    latents = recording.inputs["train/latents"]
    side = isqrt(latents[0, 0].numel() // config["clusters"])
    return from_official(
        recording.weights["model"],
        _layout(latents),
        num_heads=config["encoder_num_heads"],
        entity=f"cell:{side}x{side}",
        condition_dropout=config["label_drop_prob"],
        dropout=config["proj_dropout"],
    )


@replays("xar", "train", gradients=True)
def train(recording: Recording) -> Outputs:
    """One training pass with recorded times and noise, and the gradient of its loss."""
    generator = _generator(recording).train()
    inputs = recording.inputs
    encoder = Calls(generator.encoder)
    output = Calls(generator.output)
    tokens = as_vectors(inputs["train/latents"])
    noise = rearrange(inputs["train/noise"], "n b k c -> b (n k) c")
    t = inputs["train/t"].T
    labels = recording.classes("train/labels")
    condition = with_dropped(labels, generator, inputs["train/label_drop"])
    loss = generator.flow_loss(tokens, condition, t, noise)
    x = generator.in_order(tokens)
    return {
        "train/entities": x,
        "train/noised_input": flow.interpolate(x, noise, spread_times(t, generator.entities)),
        "train/target": flow.target(x, noise),
        "train/time_embedding": generator.time_embedding(time_index(inputs["train/t"])),
        "train/encoder_out": encoder.outputs[0],
        "train/velocity": output.outputs[0],
        "train/loss": loss[None],
        "train/grad_norm": gradient_norm(loss, generator)[None],
    }


@replays("xar", "sample")
def sample(recording: Recording) -> Outputs:
    """Latents of both solvers with and without guidance, and single calls of the first of them."""
    generator = _generator(recording)
    steps = recording.settings("sample/timestep_index")["num_steps"]
    outputs = {"sample/timestep_index": time_index(sde_times(steps)[:-1]).long()}
    for name, settings in recording.each("sample/*_latents*"):
        outputs[name] = _latents(recording, generator, settings)
    return outputs | single_calls(recording, generator)


def single_calls(recording: Recording, generator: XAR) -> Outputs:
    """What single calls of the network read and predict."""
    calls = list(recording.each("sample/*_input"))
    if not calls:
        return {}
    reads = Calls(generator.encoder.project)
    predictions = Calls(generator.output)
    _, settings = calls[0]
    _latents(recording, generator, settings)
    outputs = {}
    for name, settings in calls:
        # One more call an entity than theirs, for its clean context, but for the first entity,
        # which has none.
        number = settings["cell"] * (settings["num_steps"] + 1) + settings["call"]
        # Their first call of an entity reads the one before it and this one; ours reads them in two
        # calls.
        first = number - 1 if settings["call"] == 0 and settings["cell"] > 0 else number
        outputs[name] = torch.cat(reads.inputs[first : number + 1], 1)
        outputs[name.replace("_input", "_velocity")] = predictions.outputs[number]
    return outputs


def _latents(recording: Recording, generator: XAR, settings: Mapping[str, Any]) -> Tensor:
    solver = SOLVERS[settings["sampler"]](settings["num_steps"])
    noise = []
    for number, start in enumerate(recording.inputs["sample/x_T"]):
        noise.append(start)
        if isinstance(solver, EulerMaruyama):
            noise += recording.inputs["sample/sde_noise"][number]
    tokens = Ancestral()(
        generator,
        recording.classes("sample/labels"),
        Sampling(flow=solver),
        RecordedNoise(noise),
        guidance=_guidance(settings),
    )
    return as_map(tokens, generator.layout.segments[0].shape[0])


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    schedules = {
        "constant": Constant,
        "linear": lambda scale: Linear(scale, start=settings["cfg_start"]),
    }
    return guidance_of(settings["cfg"], settings["cfg_schedule"], schedules)


@replays("xar", "order")
def order(recording: Recording) -> Outputs:
    """Orders of cells and subsamples, and the resized latents of every scale."""
    latents = recording.inputs["train/latents"]
    layout = _layout(latents)
    outputs = {}
    for name in recording.names("output", {"order"}):
        settings = recording.settings(name)
        if settings["entity"] == "cell":
            outputs[name] = cells(layout, settings["k"], settings["k"]).order
        elif settings["entity"] == "subsample":
            outputs[name] = subsamples(layout, settings["d"]).order
        elif settings["entity"] == "scale":
            outputs[name] = pyramid(latents, settings["scales"], settings["interpolation"])
    return outputs
