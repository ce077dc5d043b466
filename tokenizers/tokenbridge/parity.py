"""Replays of TokenBridge's quantisation of channels (case `quant` of system `tokenbridge`)."""

from collections.abc import Mapping
from typing import Any

from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.tokenbridge.grid import ChannelGrid, gaussian_levels


def grid_of(settings: Mapping[str, Any]) -> ChannelGrid:
    """The grid of the official options."""
    return ChannelGrid(
        settings["quant_levels"],
        settings["quant_min"],
        settings["quant_max"],
        spread=settings["std_range"],
    )


@replays("tokenbridge", "quant")
def quantisation(recording: Recording) -> Outputs:
    """Indices and values of every recorded grid, and the table of the published one."""
    x = recording.inputs["quant/x"]
    outputs = {}
    for name in recording.names("output", {"quant"}):
        settings = recording.settings(name)
        what = name.rpartition("_")[2]
        if what in ("reconstruction", "boundaries"):
            values, boundaries = gaussian_levels(settings["quant_levels"], settings["std_range"])
            outputs[name] = values if what == "reconstruction" else boundaries
            continue
        grid = grid_of(settings)
        index = grid.quantize(x)
        outputs[name] = index if what == "indices" else grid.dequantize(index)
    return outputs
