"""Comparison of initial weights with those of the official code: mean and deviation of every kind of parameter."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SIGMAS = 5.0  # standard errors of both draws that a mean or a deviation may be off


def unlike(state: Mapping[str, Tensor], recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Recorded kinds of parameters that `state`, of official names, starts otherwise, as lines.

    A kind is an official name with * for its numbers, and perhaps the number of dimensions, "(4-D)".
    """
    found = []
    for kind, facts in recorded.items():
        values = _values(state, kind)
        if values is None:
            found.append(f"{kind}: absent")
            continue
        drawn = facts["tensors"] * math.prod(facts["shape"])
        error = math.sqrt(1 / len(values) + 1 / drawn)
        mean, std = float(values.mean()), float(values.std(correction=0))
        mean_off = abs(mean - facts["mean"]) > SIGMAS * error * facts["std"] + 1e-4 * abs(
            facts["mean"]
        )
        # Recorded with four digits; the tensors of one kind may differ in their share of it.
        std_off = abs(std - facts["std"]) > (SIGMAS * error / math.sqrt(2) + 2e-3) * facts["std"]
        if mean_off or std_off:
            expected = f"official {facts['mean']:.4g} and {facts['std']:.4g}"
            found.append(f"{kind}: mean {mean:.4g} and deviation {std:.4g}, {expected}")
    return found


def _values(state: Mapping[str, Tensor], kind: str) -> Tensor | None:
    """All values of the parameters of a kind, in float64."""
    name, _, dimensions = kind.partition(" (")
    pattern = re.escape(name).replace(r"\*", r"\d+")
    tensors = [tensor for key, tensor in state.items() if re.fullmatch(pattern, key)]
    if dimensions:
        tensors = [tensor for tensor in tensors if tensor.ndim == int(dimensions[0])]
    return torch.cat([tensor.flatten().double() for tensor in tensors]) if tensors else None
