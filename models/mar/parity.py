"""Replays of MAR's generator, diffusion head and sampler (cases `gen_*` of system `mar`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.interop.options import require
from tessellar.models.mar.model import MAR
from tessellar.models.mar.official import from_official
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.generation import guidance_of, with_dropped
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise, gradient_norm, steps_of
from tessellar.processes.diffusion import (
    AncestralDiffusion,
    Diffusion,
    ancestral_diffusion,
    full_process,
    kept_steps,
    respaced,
    strided_steps,
)
from tessellar.protocol.distribution import Model
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Constant, Guidance, Revealed
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling

READ = (
    "img_size vae_stride patch_size vae_embed_dim encoder_embed_dim encoder_depth encoder_num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads mlp_ratio class_num buffer_size diffloss_d diffloss_w num_sampling_steps "
    "diffusion_batch_mul mask_ratio_min label_drop_prob attn_dropout proj_dropout grad_checkpointing"
).split()


def recorded_generator(recording: Recording) -> MAR:
    """Our generator with the recorded weights and options."""
    config = recording.options("mar", READ)
    side = config["img_size"] // config["vae_stride"]
    generator = from_official(
        recording.weights["generator"],
        grid_layout(side, side, Continuous(config["vae_embed_dim"])),
        num_heads=config["encoder_num_heads"],
        decoder_heads=config["decoder_num_heads"],
        **training_options(config),
    )
    generator.repeats = config["diffusion_batch_mul"]
    return generator


def training_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What official options say of training, MAR's and TokenBridge's."""
    return {
        "condition_dropout": config.get("label_drop_prob", 0.1),
        "dropout": config.get("proj_dropout", 0.1),
        "attention_dropout": config.get("attn_dropout", 0.1),
        "least_masked": config.get("mask_ratio_min", 0.7),
    }


def recorded_mask(orders: Tensor, num_masked: Tensor) -> tuple[Tensor, Tensor]:
    """Which of N tokens are masked [B, N], and the places of the others [B, n] in raster order."""
    hidden = orders[:, : int(num_masked)]
    masked = torch.zeros(orders.shape, dtype=torch.bool).scatter(1, hidden, True)
    count = masked.shape[1] - hidden.shape[1]
    return masked, masked.to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def recorded_guidance(settings: Mapping[str, Any]) -> Guidance:
    """Guidance of MAR's options, which are TokenBridge's as well."""
    schedules = {"linear": Revealed, "constant": Constant}
    return guidance_of(settings["cfg"], settings["cfg_schedule"], schedules)


def _process(spacing: str) -> Diffusion:
    """Of the official option `timestep_respacing`: `ddimN`, a number, or nothing for all steps."""
    if not spacing:
        return full_process()
    if spacing.startswith("ddim"):
        return respaced(full_process(), strided_steps(int(spacing.removeprefix("ddim"))))
    return respaced(full_process(), kept_steps(int(spacing)))


def _sampling_process(recording: Recording) -> Diffusion:
    return _process(str(recording.config["mar"]["num_sampling_steps"]))


@replays("mar", "gen_schedule")
def schedules(recording: Recording) -> Outputs:
    """Kept steps and tables of every recorded spacing."""
    supported = {"noise_schedule": "cosine", "diffusion_steps": len(full_process().steps)}
    outputs = {}
    for name in recording.names("output", {"gen_schedule"}):
        settings = recording.settings(name)
        require(settings, name, supported)
        process = _process(settings["timestep_respacing"])
        tables = {
            "timesteps": torch.tensor(process.steps),
            "betas": process.betas,
            "alphas_cumprod": process.survival,
            "posterior_variance": process.posterior_variance,
            "posterior_log_variance_clipped": process.posterior_log_variance,
            "posterior_mean_coef1": process.coefficient_clean,
            "posterior_mean_coef2": process.coefficient_noisy,
        }
        outputs[name] = tables[name.partition("/")[2]]
    return outputs


@replays("mar", "gen_diffloss")
def head(recording: Recording) -> Outputs:
    """Predictions and losses of the diffusion head."""
    generator = recorded_generator(recording)
    given = recording.inputs
    z = given["diffloss/z"]
    clean = given["diffloss/target"]
    t = given["diffloss/t"]
    noise = given["diffloss/noise"]
    mask = given["diffloss/mask"]
    eps, v = generator.head(full_process().noisy(clean, t, noise), t, z)
    error, bound = full_process().losses(eps, v, clean, t, noise)
    rows = generator.row_losses(clean, z, t, noise)
    return {
        "diffloss/net_out": torch.cat([eps, v], -1),
        "diffloss/mse": error,
        "diffloss/vb": bound,
        "diffloss/loss_rows": rows,
        "diffloss/loss": ((rows * mask).sum() / mask.sum())[None],
    }


@replays("mar", "gen_diffloss_sample")
def head_samples(recording: Recording) -> Outputs:
    """Tokens as images of one token each.

    The guided run carries both branches: one noise prediction, made from the conditional rows, and
    a variance of their own.
    """
    generator = recorded_generator(recording)
    given = recording.inputs
    z = given["diffloss/z"]
    start = given["diffloss_sample/x_T"][:, None]
    half = len(start)
    both = recording.settings("diffloss_sample/out_cfg")

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat(generator.head(x[:, 0], t.expand(half), z[:half]), -1)[:, None]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        eps, v = generator.head(x[:half, 0].repeat(2, 1), t.expand(2 * half), z)
        merged = eps[half:] + both["cfg"] * (eps[:half] - eps[half:])
        return torch.cat([merged.repeat(2, 1), v], -1)[:, None]

    def run(name: str, model: Model, start: Tensor, steps: Tensor) -> Tensor:
        temperature = recording.settings(name)["temperature"]
        noise = RecordedNoise([start, *steps[:, :, None]])
        shape = (1, start.shape[-1])
        process = _sampling_process(recording)
        return ancestral_diffusion(model, process, shape, noise, temperature)[:, 0]

    twice = start.repeat(2, 1, 1)
    one = "diffloss_sample/out"
    two = "diffloss_sample/out_cfg"
    return {
        one: run(one, alone, start, given["diffloss_sample/noise"]),
        two: run(two, guided, twice, given["diffloss_sample/noise_cfg"]),
    }


@replays("mar", "gen_train", gradients=True)
def training(recording: Recording) -> Outputs:
    """Tokens, mask, hidden states with the classes; loss and gradient with some of them dropped."""
    generator = recorded_generator(recording)
    given = recording.inputs
    tokens = as_vectors(given["mar/latents"])
    masked, visible = recorded_mask(given["mar/orders"], given["mar/num_masked"])
    condition = recording.classes("mar/labels")
    dropped = with_dropped(condition, generator, given["mar/label_drop"])
    patches = generator.to_patches(tokens)
    with torch.no_grad():
        encoded = generator.backbone.encode(patches, visible, condition)
        z = generator.backbone(patches, ~masked, condition)
    loss = generator.masked_loss(tokens, masked, dropped, given["mar/t"], given["mar/noise"])
    return {
        "mar/tokens": patches,
        "mar/mask": masked.float(),
        "mar/encoder_out": encoded,
        "mar/z": z,
        "mar/loss": loss.detach()[None],
        "mar/grad_norm": gradient_norm(loss, generator)[None],
    }


@dataclass(frozen=True, kw_only=True)
class RecordedDiffusion(AncestralDiffusion):
    """The sampler with recorded noise: rows are patches of `area` tokens, the first half counts."""

    recording: Recording
    run: str
    area: int

    def integrate(
        self, model: Model, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1
    ) -> Tensor:
        start = self.recording.inputs[f"{self.run}/iter{entity}/x_T"]
        steps = self.recording.inputs[f"{self.run}/iter{entity}/noise"][:, : len(start)]
        patches = shape[0] // self.area
        draws = (
            rearrange(rows, "(b l) (c q) -> b (l q) c", l=patches, q=self.area)
            for rows in [start, *steps]
        )
        process = _sampling_process(self.recording)
        return ancestral_diffusion(model, process, shape, RecordedNoise(draws), self.temperature)


@replays("mar", "gen_sample_*")
def sampling(recording: Recording) -> Outputs:
    """Latents of every run, and the scale of guidance at each of its steps."""
    generator = recorded_generator(recording)
    area = generator.patch**2
    side = generator.layout.segments[0].shape[0]
    outputs = {}
    for name, settings in recording.each("mar_sample_*/latents"):
        run = name.removesuffix("/latents")
        guidance = recorded_guidance(settings)
        entities = generator.sets(recording.inputs["mar/orders"].flip(1), settings["num_iter"])
        state = generator.start(recording.classes("mar/labels"), guidance, entities)
        diffusion = RecordedDiffusion(
            temperature=settings["temperature"], recording=recording, run=run, area=area
        )
        for step in steps_of(generator, state, Sampling(diffusion=diffusion), Noise([])):
            outputs[name] = as_map(step.tokens, side)
        scales = torch.ones(entities.count)
        if guidance.schedule is not None:
            patches = tuple(size // area for size in entities.sizes)
            planned = Entities(torch.arange(generator.length), patches)
            scales = guidance.schedule(torch.arange(entities.count)[None], planned)[0]
        outputs[f"{run}/cfg_per_iter"] = scales
    return outputs
