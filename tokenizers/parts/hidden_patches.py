"""Patches that an encoder does not see in training: which, and vectors of the others among those of
all.
"""

from math import ceil

import torch
from torch import Tensor

from tessellar import distributed


def visible(noise: Tensor, share: float) -> Tensor:
    """Places [B, n] of the patches that stay where a `share` is hidden: those of the least noise
    [B, N].
    """
    kept = ceil(noise.shape[1] * (1 - share))
    return noise.argsort(dim=1)[:, :kept]


def draw_places(masked: tuple[float, float], batch: int, count: int) -> Tensor | None:
    """Visible patches [B, n] of `count` in a training pass, as many in every image of all processes;
    None: all.

    The hidden share is drawn from the range `masked`, and below 0 it is 0.
    """
    low, high = masked
    share = max(0.0, low + (high - low) * float(torch.rand(())))
    share = float(distributed.broadcast(share))
    if share == 0:
        return None
    return visible(torch.rand(batch, count), share)


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Vectors [B, n, D] of those of all patches [B, N, D]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def spread(values: Tensor, places: Tensor, others: Tensor) -> Tensor:
    """[B, N, D]: vectors [B, n, D] at their places, and those of `others` [B, N, D] elsewhere."""
    index = places[..., None].expand(-1, -1, values.shape[-1])
    return others.to(values.dtype).scatter(1, index, values)
