"""Flow matching on straight paths (rectified flow, arXiv 2209.03003): F_t = (1 - t) x + t noise, velocity noise - x.

t = 1 is pure noise. Times of training are logit-normal (arXiv 2403.03206), as in xAR.
"""

import torch
from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """F_t of data and noise [B, n, C] at times that broadcast, as [B, n, 1]."""
    return (1 - t) * x + t * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """Velocity dF/dt of the path, what the network learns."""
    return noise - x


def logit_normal(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Times in (0, 1): sigmoid of standard normal draws of the global stream."""
    return torch.randn(*shape, device=device).sigmoid()
