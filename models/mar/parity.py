"""Replay of MAR's generator, diffusion head and sampler (cases `gen_*` of recordings of system `mar`)."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.models.mar.model import MAR
from tessellar.models.mar.official import from_official
from tessellar.parity.recording import Recording
from tessellar.processes.diffusion import (
    Diffusion,
    ancestral_diffusion,
    full_process,
    kept_steps,
    respaced,
    strided_steps,
)
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Implicit, Model
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Revealed
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from


def mar(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases."""
    outputs: dict[str, Tensor] = {}
    for case, replay in CASES.items():
        if case in recording.cases:
            outputs |= replay(recording)
    for case in ("cfg", "nocfg"):
        if f"gen_sample_{case}" in recording.cases:
            outputs |= _sampled(recording, f"mar_sample_{case}", case == "cfg")
    return outputs


def _generator(recording: Recording) -> MAR:
    config = recording.config["mar"]
    side = config["img_size"] // config["vae_stride"]
    layout = grid_layout(side, side, Continuous(config["vae_embed_dim"]))
    generator = from_official(recording.weights["generator"], layout, config["encoder_num_heads"])
    assert config["encoder_num_heads"] == config["decoder_num_heads"], "one number of heads for both halves"
    generator.repeats = config["diffusion_batch_mul"]
    return generator


def _schedules(recording: Recording) -> dict[str, Tensor]:
    outputs = _tables("schedule1000", full_process())
    for name in recording.names("output", {"gen_schedule"}):
        run, _, kind = name.partition("/")
        if kind == "timesteps":
            steps = _tiny_steps(recording) if run == "schedule_tiny" else kept_steps(int(run.removeprefix("schedule")))
            outputs[name] = torch.tensor(steps)
        elif kind == "betas" and run != "schedule1000":
            outputs |= _tables(run, respaced(full_process(), kept_steps(int(run.removeprefix("schedule")))))
    return outputs


def _tables(run: str, process: Diffusion) -> dict[str, Tensor]:
    return {
        f"{run}/betas": process.betas,
        f"{run}/alphas_cumprod": process.survival,
        f"{run}/posterior_variance": process.posterior_variance,
        f"{run}/posterior_log_variance_clipped": process.posterior_log_variance,
        f"{run}/posterior_mean_coef1": process.coefficient_clean,
        f"{run}/posterior_mean_coef2": process.coefficient_noisy,
    }


def _tiny_steps(recording: Recording) -> list[int]:
    """Kept steps of the official option string: `ddimN`, or a number."""
    text = str(recording.config["mar"]["num_sampling_steps"])
    return strided_steps(int(text[4:])) if text.startswith("ddim") else kept_steps(int(text))


@torch.no_grad()
def _head(recording: Recording) -> dict[str, Tensor]:
    generator, given = _generator(recording), recording.inputs
    z, clean, t, noise = (given[f"diffloss/{name}"] for name in ("z", "target", "t", "noise"))
    eps, v = generator.head(full_process().noisy(clean, t, noise), t, z)
    error, bound = full_process().losses(eps, v, clean, t, noise)
    rows, mask = generator.row_losses(clean, z, t, noise), given["diffloss/mask"]
    return {
        "diffloss/net_out": torch.cat([eps, v], -1),
        "diffloss/mse": error,
        "diffloss/vb": bound,
        "diffloss/loss_rows": rows,
        "diffloss/loss": ((rows * mask).sum() / mask.sum())[None],
    }


class RecordedNoise(Noise):
    """Normal draws as they were recorded, one after the other."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        super().__init__([])
        self.draws = draws

    def normal(self, *shape: int) -> Tensor:
        return next(self.draws)


@torch.no_grad()
def _head_samples(recording: Recording) -> dict[str, Tensor]:
    """Tokens as images of one token each. The guided run carries both branches: one noise prediction, made from the
    conditional rows, and a variance of their own."""
    generator, given = _generator(recording), recording.inputs
    process = respaced(full_process(), _tiny_steps(recording))
    start = given["diffloss_sample/x_T"][:, None]
    half, z = len(start), given["diffloss/z"]
    temperature = recording.settings("diffloss_sample/out")["temperature"]
    scale = recording.settings("diffloss_sample/out_cfg")["cfg"]

    def run(model: Model, start: Tensor, steps: Tensor) -> Tensor:
        draws = RecordedNoise(iter([start, *steps[:, :, None]]))
        return ancestral_diffusion(model, process, (1, start.shape[-1]), draws, temperature)[:, 0]

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat(generator.head(x[:, 0], t.expand(half), z[:half]), -1)[:, None]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        eps, v = generator.head(x[:half, 0].repeat(2, 1), t.expand(2 * half), z)
        merged = eps[half:] + scale * (eps[:half] - eps[half:])
        return torch.cat([merged.repeat(2, 1), v], -1)[:, None]

    return {
        "diffloss_sample/out": run(alone, start, given["diffloss_sample/noise"]),
        "diffloss_sample/out_cfg": run(guided, start.repeat(2, 1, 1), given["diffloss_sample/noise_cfg"]),
    }


def _training(recording: Recording) -> dict[str, Tensor]:
    generator, given = _generator(recording), recording.inputs
    tokens = rearrange(given["mar/latents"], "b c h w -> b (h w) c")
    masked = _masked(given["mar/orders"], int(given["mar/num_masked"]))
    condition = Condition(ids=given["mar/labels"])
    patches = generator.to_patches(tokens)
    with torch.no_grad():
        visible = (~masked).to(torch.int8).argsort(dim=1, stable=True, descending=True)[:, : int((~masked[0]).sum())]
        outputs = {
            "mar/tokens": patches,
            "mar/mask": masked.float(),
            "mar/encoder_out": generator.encode(patches, visible, condition),
            "mar/z": generator.vectors(patches, ~masked, condition),
        }
    dropped = condition.where(given["mar/label_drop"] == 0, generator.null(condition))
    loss = generator.masked_loss(tokens, masked, dropped, given["mar/t"], given["mar/noise"])
    loss.backward()
    gradients = [p.grad for p in generator.parameters() if p.grad is not None]
    outputs["mar/loss"] = loss.detach()[None]
    outputs["mar/grad_norm"] = torch.stack([g.norm() for g in gradients]).norm()[None]
    return outputs


def _masked(orders: Tensor, count: int) -> Tensor:
    """The first `count` entries of each order."""
    return torch.zeros(orders.shape, dtype=torch.bool).scatter(1, orders[:, :count], True)


CASES: dict[str, Any] = {
    "gen_schedule": _schedules,
    "gen_diffloss": _head,
    "gen_diffloss_sample": _head_samples,
    "gen_train": _training,
}


class RecordedDiffusion:
    """The sampler with its recorded noise: rows are sample-major patches, of which the conditional half counts."""

    def __init__(self, recording: Recording, run: str, area: int, temperature: float) -> None:
        self.recording, self.run, self.area, self.temperature = recording, run, area, temperature
        self.process = respaced(full_process(), _tiny_steps(recording))

    def integrate(self, model: Model, shape: tuple[int, int], noise: Noise, entity: int, count: int) -> Tensor:
        start = self.recording.inputs[f"{self.run}/iter{entity}/x_T"]
        steps = self.recording.inputs[f"{self.run}/iter{entity}/noise"][:, : len(start)]
        patches = shape[0] // self.area
        draws = (rearrange(rows, "(b l) (c q) -> b (l q) c", l=patches, q=self.area) for rows in [start, *steps])
        return ancestral_diffusion(model, self.process, shape, RecordedNoise(draws), self.temperature)


@torch.no_grad()
def _sampled(recording: Recording, run: str, guided: bool) -> dict[str, Tensor]:
    generator, settings = _generator(recording), recording.config["sampling"]
    area, latents = generator.patch**2, recording.entries[f"{run}/latents"]
    said = re.search(r"cfg ([0-9.]+\d)", latents.meaning)
    scale = float(said[1]) if said else settings["cfg"]
    guidance = Guidance(Revealed(scale)) if guided else NO_GUIDANCE
    condition = Condition(ids=recording.inputs["mar/labels"])
    entities = generator.sets(recording.inputs["mar/orders"].flip(1), settings["num_iter"])
    state = generator.start(condition, guidance, entities)
    tokens = generator.layout.blank(condition.batch)
    sampler = RecordedDiffusion(recording, run, area, settings["temperature"])
    for step in decode_from(generator, state, sampler, Noise([]), tokens):
        assert isinstance(step.distribution, Implicit)
        tokens = step.tokens
    planned = Entities(torch.arange(generator.length), tuple(size // area for size in entities.sizes))
    used = Revealed(scale)(torch.arange(entities.count)[None], planned)[0]
    height, width = latents.shape[-2:]
    return {
        f"{run}/latents": rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width),
        f"{run}/cfg_per_iter": used if guided else torch.ones(entities.count),
    }
