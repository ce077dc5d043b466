"""Replays of TokenUnify: patches, what is hidden of them, losses and schedules, one Mamba layer.

The recorded network is a 3D segmentation network for microscopy volumes, which this project has
not; its recorded outputs stand in where the losses ask for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.weights import load_strict, part_of
from tessellar.layers.mamba import MambaLayer
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import out_of_scope, replays
from tessellar.training.methods.mixture import (
    Alternating,
    Joint,
    MixtureSchedule,
    filled,
    hidden_at,
    hidden_behind,
)

SYSTEM = "tokenunify"

out_of_scope(SYSTEM, "net", reason="the 3D segmentation network for microscopy volumes")

#: Theirs <-> ours, of one layer; {} is the direction.
OF_A_SCAN = {
    "conv1d{}.weight": "conv.weight",
    "conv1d{}.bias": "conv.bias",
    "x_proj{}.weight": "x_proj.weight",
    "dt_proj{}.weight": "dt_proj.weight",
    "dt_proj{}.bias": "dt_proj.bias",
    "A{}_log": "a_log",
    "D{}": "skip",
}
SCANS = {"": "forward_scan", "_b": "backward_scan", "_s": "sliced_scan"}


def cut(volume: Tensor, patch: Sequence[int]) -> Tensor:
    """Patches [N, *patch] of a volume, in raster order."""
    split: list[int] = []
    for side, size in zip(volume.shape, patch, strict=True):
        split += [side // size, size]
    counts = list(range(0, 2 * volume.ndim, 2))
    inside = list(range(1, 2 * volume.ndim, 2))
    return volume.reshape(split).permute(*counts, *inside).reshape(-1, *patch)


def joined(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """The volume of `shape` that patches [N, *patch] make; the inverse of `cut`."""
    patch = patches.shape[1:]
    counts = [side // size for side, size in zip(shape, patch, strict=True)]
    order: list[int] = []
    for axis in range(len(shape)):
        order += [axis, len(shape) + axis]
    return patches.reshape(*counts, *patch).permute(order).reshape(*shape)


def _filled_runs(
    recording: Recording, pattern: str, hidden: Tensor, places: Tensor, noise: Tensor
) -> Outputs:
    """The volume with its hidden places [1, N] replaced, as each recorded run says: by 0, or by
    `noise` [n, *patch] at `places` [n].
    """
    volume = recording.inputs["volume"]
    patches = cut(volume, recording.config["patch"])
    fill = torch.zeros_like(patches)
    fill[places] = noise
    outputs = {}
    for name, settings in recording.each(pattern):
        if "fill" not in settings:
            continue
        chosen = {"zero": torch.zeros(()), "noise": fill[None]}[settings["fill"]]
        outputs[name] = joined(filled(patches[None], hidden, chosen)[0], volume.shape)
    return outputs


@replays(SYSTEM, "patches")
def patches(recording: Recording) -> Outputs:
    """The raster sequence."""
    return {"patches": cut(recording.inputs["volume"], recording.config["patch"])}


@replays(SYSTEM, "next")
def next_patch(recording: Recording) -> Outputs:
    """What is kept in front of the patch that is asked for."""
    sequence = cut(recording.inputs["volume"], recording.config["patch"])
    count = recording.inputs["next/num_context"]
    hidden = hidden_behind(count[None], len(sequence))
    noise = recording.inputs["next/fill_noise"]
    places = torch.arange(int(count), len(sequence))
    outputs = _filled_runs(recording, "next/*", hidden, places, noise)
    return {**outputs, "next/target": sequence[int(count)]}


@replays(SYSTEM, "random")
def random_patches(recording: Recording) -> Outputs:
    """What is hidden at random."""
    length = len(cut(recording.inputs["volume"], recording.config["patch"]))
    places = recording.inputs["random/mask_indices"]
    noise = recording.inputs["random/fill_noise"]
    hidden = hidden_at(places[None], length)
    return _filled_runs(recording, "random/*", hidden, places, noise)


def schedule_of(settings: Mapping[str, Any]) -> MixtureSchedule:
    """Theirs by its number; the official one alternates every 100 epochs."""
    return {0: Alternating(), 1: Joint()}[settings["auto_mode"]]


@replays(SYSTEM, "loss")
def loss(recording: Recording) -> Outputs:
    """The two losses of the recorded predictions, and their sum at each epoch's weights."""
    volume = recording.inputs["volume"]
    sequence = cut(volume, recording.config["patch"])
    target = sequence[int(recording.inputs["next/num_context"])]
    of_all = F.mse_loss(recording.tensors["net/out"].reshape(volume.shape), volume)
    of_next = F.mse_loss(recording.tensors["net/next_pred"].reshape(target.shape), target)
    outputs = {"loss/next_all": of_all, "loss/next": of_next}
    for name, settings in recording.each("loss/*"):
        if "auto_mode" in settings:
            weights = schedule_of(settings).weights(settings.get("epoch", 0), 0.0)
            outputs[name] = weights.next * of_next + weights.next_all * of_all
    return outputs


def layer_of(recording: Recording, stage: int, number: int) -> MambaLayer:
    """One layer of a stage, with its recorded weights."""
    config = recording.config
    layer = MambaLayer(
        config["feat_size"][stage],
        config["d_state"],
        kernel=config["d_conv"],
        expand=config["expand"],
        slices=config["nslices"],
    )
    theirs = part_of(recording.weights["model"], f"vit.stages.{stage}.{number}.")
    names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    for linear in ("in_proj", "out_proj"):
        names[f"mamba.{linear}.weight"] = f"mamba.{linear}.weight"
    for direction, scan in SCANS.items():
        for their_name, our_name in OF_A_SCAN.items():
            names[f"mamba.{their_name.format(direction)}"] = f"mamba.{scan}.{our_name}"
    ours = {names.get(name, name): tensor for name, tensor in theirs.items()}
    load_strict(layer, ours, f"{recording.folder} (stage {stage})")
    return layer.eval()


@replays(SYSTEM, "mamba")
def mamba(recording: Recording) -> Outputs:
    """One layer of a stage."""
    settings = recording.settings("mamba/out")
    layer = layer_of(recording, settings["stage"], settings.get("layer", 0))
    return {"mamba/out": layer(recording.inputs["mamba/in"])}
