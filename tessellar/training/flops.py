"""Floating-point operations of a training batch, and the peak rates of known GPUs to hold them
against (MFU).

PaLM (arXiv 2204.02311, appendix B) defines model FLOPs utilisation. Matrix products, convolutions
and attention are counted by torch's own formulas as they run, forward and backward; so recomputed
activations count too.
"""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Dense peak operations per second by the makers' data sheets: bfloat16, and float32 by TF32.
PEAKS = {
    "B200": (2250e12, 1125e12),
    "H200": (989.4e12, 494.7e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


class CountFlops(TorchDispatchMode):
    """Adds up, in `total`, the operations that run inside; results stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.active = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result

    def __enter__(self) -> "CountFlops":
        self.active = True
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.active = False
        super().__exit__(kind, error, trace)


def countable(module: nn.Module) -> bool:
    """Whether operations can be seen: those inside of compiled blocks cannot."""
    return not any(part._compiled_call_impl is not None for part in module.modules())


def peak(device: torch.device, precision: str) -> float | None:
    """Peak operations per second of a device in a precision of Lightning's; None where it is not
    known.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """Peak by a GPU's name, such as `NVIDIA H100 80GB HBM3`."""
    known = next(
        (
            rates
            for part, rates in PEAKS.items()
            if set(part.split()) <= set(name.replace("-", " ").split())
        ),
        None,
    )
    if known is None or precision.startswith("64"):
        return None
    return known[0] if "bf16" in precision else known[1]
