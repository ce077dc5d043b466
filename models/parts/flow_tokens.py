"""Training of a flow head on tokens: one velocity a token, at drawn times."""

from collections.abc import Callable

import torch
from torch import Tensor

from tessellar.processes import flow


def velocity_error(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of velocities `predict(noisy [K, B, N, C], t)` (dF/dt, from data to noise)
    at times t [K, B, N], 1 is noise, with noise [K, B, N, C]; `weight` [B] weighs samples.
    """
    noisy = flow.interpolate(clean, noise, t[..., None])
    error = (predict(noisy, t) - flow.target(clean, noise)).square().mean((0, 2, 3))
    if weight is None:
        return error.mean()
    return (error * weight).sum() / weight.sum().clamp(min=torch.finfo(error.dtype).eps)
