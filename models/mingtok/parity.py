"""Replays of Ming-UniVision's head (recordings of system `mingtok`): condition, velocity, and its sampler
with up to three branches of guidance, one row a branch.
"""

from collections.abc import Sequence

from torch import Tensor

from tessellar.interop.options import check_options, check_sizes
from tessellar.models.mingtok.official import Head, head_from_official
from tessellar.parity.recording import Outputs, Recording, Settings
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise
from tessellar.processes.flow import Euler
from tessellar.protocol.guidance import no_longer

READ = (
    "branches temperature text_cfg image_cfg cfg_renorm_type time_shifting_factor num_sampling_steps"
).split()


def recorded_head(recording: Recording) -> Head:
    """The recorded head, checked against the config."""
    sizes = "hidden width depth".split()
    config = recording.options("flow_head", (*sizes, "steps"), {"mlp_mult": 4})
    made = head_from_official(recording.weights["model"])
    found = {
        "hidden": made.to_condition.linear.in_features,
        "width": made.flow_head.input.out_features,
        "depth": len(made.flow_head.blocks),
    }
    check_sizes(config, "the config's flow_head", found)
    return made


@replays("mingtok", "head")
def one_step(recording: Recording) -> Outputs:
    """Conditions and velocities of recorded hidden states."""
    made = recorded_head(recording)
    given = recording.inputs
    z = made.to_condition(given["head/hidden"])
    return {
        "head/z": z,
        "head/velocity": made.flow_head(given["head/x_t"], given["head/t"], z),
        "head/time_embed": made.flow_head.time(1000 * given["head/t"]),
    }


def guided(velocities: Sequence[Tensor], settings: Settings) -> Tensor:
    """Of the rows conditional, null, and (editing) null text with the input image."""
    conditional = velocities[0]
    if len(velocities) == 1:
        return conditional
    null = velocities[1]
    found = null
    base = null
    if len(velocities) == 3:
        base = velocities[2]
        found = found + settings["image_cfg"] * (base - null)
    found = found + settings["text_cfg"] * (conditional - base)
    if settings["cfg_renorm_type"] is None:
        return found
    return no_longer(found, conditional)


@replays("mingtok", "shared", "head", "head_sample")
def sampler(recording: Recording) -> Outputs:
    """The rows of an image have one state and one noise; all end with the same latent."""
    made = recorded_head(recording)
    outputs = {}
    for name, settings in recording.each("head/sample_*"):
        check_options(settings, name, READ)
        if settings["cfg_renorm_type"] is not None:
            check_options(settings, name, READ, {"cfg_renorm_type": "channel"})
        rows = settings["branches"]
        z = made.to_condition(recording.inputs["head/hidden"][:rows])[:, None]

        def velocity(x: Tensor, t: Tensor, z: Tensor = z, settings: Settings = settings) -> Tensor:
            each = made.flow_head(x.float().expand(len(z), -1, -1), t.float().expand(len(z), 1), z)
            return -guided(each.split(1), settings)

        solver = Euler(
            settings["num_sampling_steps"],
            time_shift=settings["time_shifting_factor"] or 1.0,
            temperature=settings["temperature"],
        )
        noise = RecordedNoise([recording.inputs["head/noise1"][:, None]])
        drawn = solver.integrate(velocity, noise_shape(recording), noise)
        outputs[name] = drawn[:, 0].expand(rows, -1)
    return outputs


def noise_shape(recording: Recording) -> tuple[int, int]:
    """One token of as many channels as the recorded noise."""
    return 1, recording.inputs["head/noise1"].shape[-1]
