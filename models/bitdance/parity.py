"""Replays of BitDance's generators and heads (recordings of systems `bitdance`, `bitdance_parallel`
and `bitdance_t2i_head`): teacher forcing, the loss, head and sampler alone, guided decoding, flips.

Recorded rows of single tokens have no axis of patches. The official time is 0 at noise, and its
sampler takes one step more than `sample_steps`, from 0.95 to 1.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.models.bitdance.head import LEAST, BinaryHead, sincos_table
from tessellar.models.bitdance.model import BitDance, ClassTokens, NullFirst, flipped
from tessellar.models.bitdance.official import from_official, head_from_official
from tessellar.parity.forms import as_vectors
from tessellar.parity.generation import guidance_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise
from tessellar.processes.flow import EulerMaruyamaToData, Times
from tessellar.protocol.entities import cells
from tessellar.protocol.guidance import Constant, Linear
from tessellar.protocol.layout import Bits, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.bitdance.parity import recorded_autoencoder, signs_of

READ = (
    "dim n_layer n_head diff_layers diff_dim diff_adanln_layers latent_dim down_size resolution cls_token_num "
    "num_classes parallel_num diff_batch_mul time_shift P_std P_mean vae_ddconfig_override num_codebooks sample"
).split()
SCHEDULES = {"linear": partial(Linear, reach_end=False), "constant": Constant}
# Numbers a unit in the last place beside: guidance makes thousandths of such roundings.
BESIDE = (1 + 2.0**-23, 1 - 2.0**-23, 1 + 2.0**-22, 1 - 2.0**-22)
SUPPORTED = {"patch_size": 1, "time_schedule": "logit_normal", "parallel_mode": "patch"}


def _times(config: Mapping[str, Any]) -> Times:
    """Our time is 1 - theirs."""
    return Times(mean=-config["P_mean"], std=config["P_std"], time_shift=config["time_shift"])


def _generator(recording: Recording) -> BitDance:
    config = recording.options(read=READ, supported=SUPPORTED)
    made = from_official(
        recording.weights["model"],
        recorded_autoencoder(recording).layout,
        num_heads=config["n_head"],
        repeats=config["diff_batch_mul"],
        times=_times(config),
    )
    assert isinstance(made.conditioning, ClassTokens)
    sizes = {
        "dim": made.width,
        "n_layer": len(made.layers),
        "diff_layers": len(made.denoiser.blocks),
        "diff_dim": made.denoiser.input.out_features,
        "diff_adanln_layers": len(made.denoiser.modulations),
        "latent_dim": made.bits,
        "cls_token_num": made.conditioning.length,
        "num_classes": made.conditioning.num_classes,
    }
    if "parallel_num" in config:
        sizes["parallel_num"] = made.area
    recording.check_sizes(sizes)
    return made


def _tokens(recording: Recording) -> Tensor:
    return recorded_autoencoder(recording).encode(recording.inputs["image"])


def _in_patches(rows: Tensor) -> Tensor:
    """Recorded rows [n, C] of single tokens as [n, 1, C]; of patches as they are."""
    return rows[:, None] if rows.ndim == 2 else rows


def _like(rows: Tensor, area: int) -> Tensor:
    """Rows [n, P, C] as they are recorded: of single tokens [n, C]."""
    return rows[:, 0] if area == 1 else rows


@replays("bitdance", "tf", "loss", "head")
@replays("bitdance_parallel", "tf", "loss", "head")
def teacher_forcing(recording: Recording) -> Outputs:
    """What the head reads and learns of the image, the loss, and one prediction."""
    generator = _generator(recording)
    given = recording.inputs
    tokens = _tokens(recording)
    states = generator.states(tokens, recording.classes("labels"))
    clean = generator.patches(tokens)
    t = 1 - generator.times.of_normal(-given["loss.t_normal"])
    loss = generator.flow_loss(states, clean, t, _in_patches(given["loss.e"]))
    predicted = generator.denoiser(_in_patches(given["head.z"]), given["head.t"], states)
    return {
        "tf.cond": _like(states, generator.area),
        "tf.target": _like(clean, generator.area),
        "loss.value": loss[None],
        "head.x_pred": _like(predicted, generator.area),
    }


def _sampled(
    head: BinaryHead,
    condition: Tensor,
    scale: float,
    start: Tensor,
    noise: Tensor,
    shift: float = 1.0,
) -> Tensor:
    """What the sampler ends with, [B, P, C], from `start` [B, P, C]; `condition` holds null rows behind
    the others where there is guidance.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        rows = len(condition) // len(x)
        time = (1 - t).float().expand(len(condition))
        clean = head(x.float().repeat(rows, 1, 1), time, condition)
        v = (x.float().repeat(rows, 1, 1) - clean) / t.float().clamp(min=LEAST)
        if rows == 1:
            return v
        conditional, null = v.chunk(2)
        return null + scale * (conditional - null)

    solver = EulerMaruyamaToData(len(noise) + 1, time_shift=shift)
    return solver.integrate(
        velocity, (start.shape[1], start.shape[2]), RecordedNoise([start, *noise])
    )


@replays("bitdance", "head_sample_*")
@replays("bitdance_parallel", "head_sample_*")
def head_samples(recording: Recording) -> Outputs:
    """The sampler alone, on the first of the recorded conditions, without and with guidance."""
    generator = _generator(recording)
    states = generator.states(_tokens(recording), recording.classes("labels"))
    outputs = {}
    for name in recording.outputs("head_sample.*.out"):
        run = name.removesuffix(".out")
        settings = recording.settings(name)
        _check_sampler(settings)
        start = _in_patches(recording.inputs[f"{run}.x0"])
        noise = [_in_patches(step) for step in recording.inputs[f"{run}.noise"]]
        rows = states[: settings["num_rows"]]
        if "conditional_rows" in settings:
            rows = states[settings["conditional_rows"] + settings["unconditional_rows"]]
        shift = recording.config["time_shift"]
        found = _sampled(
            generator.denoiser, rows, settings["cfg"], start, torch.stack(noise), shift
        )
        repeated = found.repeat(len(rows) // len(found), 1, 1)
        outputs[name] = _like(repeated, generator.area)
    return outputs


def _check_sampler(settings: Mapping[str, Any]) -> None:
    if settings["last_step_size"] != LEAST:
        raise UserError(
            f"last_step_size is {settings['last_step_size']}; only {LEAST} is supported"
        )


class Watched(EulerMaruyamaToData):
    """The sampler, which keeps what it ends with: what the signs are taken of."""

    kept: list[Tensor]

    def integrate(
        self, model: Any, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1
    ) -> Tensor:
        found = super().integrate(model, shape, noise, entity, count)
        self.kept.append(found)
        return found


@replays("bitdance", "sample_cfg")
@replays("bitdance_parallel", "sample_cfg")
def sampling(recording: Recording) -> Outputs:
    """A whole decoding with a cache: the first step without guidance, its null rows by themselves.

    The recording's processor adds up more than eight keys in another order than others do, and the
    sampler makes thousandths of such roundings: ours are kept out of the attention. What is left
    is measured.
    """
    generator = _generator(recording)
    for layer in generator.layers:
        layer.attention.implementation = "float64"  # type: ignore[union-attr]
    found, tokens = _decoded(recording, generator, 1.0)
    beside = [_decoded(recording, generator, factor)[0] for factor in BESIDE]
    height = generator.layout.segments[0].shape[0]
    channels_last = generator.area == 1
    image = _drawn(recording, tokens, channels_last)
    if channels_last:
        other = _drawn(recording, tokens, channels_last=False)
        image = recording.grown("sample.image", image, other)
    return {
        "sample.pre_sign": recording.grown("sample.pre_sign", found, *beside),
        "sample.bits": signs_of(tokens, height),
        "sample.image": image,
    }


def _decoded(recording: Recording, generator: BitDance, factor: float) -> tuple[Tensor, Tensor]:
    """What the sampler ends with at every step, as it is recorded, and tokens [B, N, z]; the noise is
    multiplied by `factor`.
    """
    given = recording.inputs
    settings = recording.settings("sample.bits")
    condition = recording.classes("labels")
    batch = condition.batch
    solver = Watched(settings["sample_steps"] + 1, time_shift=recording.config["time_shift"])
    object.__setattr__(solver, "kept", [])
    first = given["sample.noise_first"] * factor
    noise = RecordedNoise(_draws(first, given["sample.noise"] * factor, batch))
    state = generator.start(
        condition, guidance_of(settings["cfg_scale"], settings["cfg_schedule"], SCHEDULES)
    )
    tokens = generator.layout.blank(batch)
    for step in decode_from(generator, state, Sampling(flow=solver), noise, tokens):
        tokens = step.tokens
    branches = state.guidance.branches
    ends = [end.repeat(branches, 1, 1) for end in solver.kept]
    if isinstance(state.part, NullFirst):
        ends = [torch.cat(solver.kept[:2]), *ends[2:]]
    found = torch.stack(ends)
    return found[:, :, 0] if generator.area == 1 else found, tokens


def _drawn(recording: Recording, tokens: Tensor, channels_last: bool) -> Tensor:
    """The image of tokens [B, N, z]. The official map of single tokens lies channels-last in memory,
    where GroupNorm on a CPU rounds much more coarsely.
    """
    tokenizer = recorded_autoencoder(recording)
    if not channels_last:
        return tokenizer.decode(tokens)
    codes = signs_of(tokens, tokenizer.grid[0]).contiguous(memory_format=torch.channels_last)
    decoder = tokenizer.decoder
    h = decoder.mid(decoder.conv_in(codes))
    for level in decoder.levels:
        h = level(h, codes)
    return decoder.conv_out(F.silu(decoder.norm_out(h)))


def _draws(first: Tensor, later: Tensor, batch: int) -> Iterator[Tensor]:
    """Noises in the order in which we ask: of the first patch, of the null rows' first patch, of each
    later one.
    """
    for part in first.split(batch, dim=1):
        for step in part:
            yield _in_patches(step)
    for patch in later:
        for step in patch:
            yield _in_patches(step)


@replays("bitdance", "flip")
@replays("bitdance_parallel", "flip")
def flips(recording: Recording) -> Outputs:
    """The bits as training reads them, with recorded draws."""
    draws = [as_vectors(recording.inputs[f"flip.{name}"]) for name in ("r1", "r2")]
    most = recording.settings("flip.out")["p_max"]
    tokens = _tokens(recording)
    height = recording.inputs["flip.r1"].shape[2]
    return {"flip.out": signs_of(flipped(tokens, most, draws[0], draws[1]), height)}


HEAD = (
    "ch_target ch_cond ch_latent depth_latent depth_adanln time_shift P_mean P_std parallel_num diff_batch_mul sample "
    "pos2d"
).split()


@replays("bitdance_t2i_head", "*")
def text_head(recording: Recording) -> Outputs:
    """The bounded head: a prediction, the loss of each token, a guided draw; and the fixed positions."""
    config = recording.config
    recording.options(read=HEAD, supported={"time_schedule": "logit_normal", "use_swiglu": True})
    given = recording.inputs
    head = head_from_official(recording.weights["model"], config["parallel_num"])
    t = 1 - _times(config).of_normal(-given["loss.t_normal"])
    settings = recording.settings("sample.out")
    _check_sampler(settings)

    def drawn(factor: float) -> Tensor:
        condition = given["sample.cond"] * factor
        noise = given["sample.noise"] * factor
        shift = config["time_shift"]
        found = _sampled(head, condition, settings["cfg"], given["sample.x0"], noise, shift)
        return found.repeat(2, 1, 1)

    outputs = {
        "x_pred": head(given["z"], given["t"], given["cond"]),
        "loss.map": head.row_losses(given["target"], t, given["loss.e"], given["cond"]),
        "sample.out": recording.grown("sample.out", drawn(1.0), *map(drawn, BESIDE)),
    }
    for name in recording.outputs("pos2d*"):
        outputs[name] = _positions(recording.settings(name), config["pos2d"]["hidden"])
    return outputs


def _positions(settings: Mapping[str, Any], width: int) -> Tensor:
    """The fixed table of a grid of h x w cells in the order of its patches."""
    side = settings["w"]
    layout = grid_layout(settings["h"], side, Bits(1))
    order = cells(layout, settings["ps"], settings["ps"]).order
    return sincos_table(order // side, order % side, width)
