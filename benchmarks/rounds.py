"""Interleaved rounds of several ways to do the same work, and the limits of the machine they ran on.

Rounds go through all ways in turn and the fastest of each counts, so that what else the machine does falls on all of
them alike. CPU seconds are kept beside wall seconds: on a shared core only their ratios say anything.
"""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from tessellar.layers.precision import computes_bfloat16


class Least(NamedTuple):
    """Of all rounds of one way: the least seconds of the clock, and of the processor."""

    wall: float
    cpu: float


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Least]:
    """The fastest of `rounds` of each way, after one that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            work()
            _wait()
            if number:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    least = {}
    for name, times in found.items():
        least[name] = Least(min(wall for wall, _ in times), min(cpu for _, cpu in times))
    return least


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(size: int = 1024) -> dict[str, Any]:
    """Name, threads and measured limits: products of matrices in FLOP/s, reading memory in B/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    emulated = device == "cpu" and not computes_bfloat16()
    for name in ("float32",) if emulated else ("float32", "bfloat16"):
        matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
        seconds = interleaved({"product": lambda m=matrix: m @ m}, 5)["product"].cpu
        limits[f"{name}_flops"] = 2 * size**3 / max(seconds, 1e-9)
    block = torch.ones(size * size * 16, device=device)
    seconds = interleaved({"sum": block.sum}, 5)["sum"].cpu
    limits["bytes_a_second"] = block.numel() * block.itemsize / max(seconds, 1e-9)
    return limits


def text_of(row: Mapping[str, Any]) -> str:
    """A row of results as one line."""
    parts = []
    for name, value in row.items():
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)
