"""Flow matching on straight paths (rectified flow, arXiv 2209.03003): F_t = (1 - t) x + t noise, velocity noise - x.

t = 1 is pure noise. Times of training are logit-normal, as in xAR, or drawn by a mode (both arXiv 2403.03206); their
draws may be stratified over the batch. FlexTok's decoder learns the same way.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

TimeLaw = Literal["logit_normal", "mode"]


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """F_t of data and noise [B, n, C] at times that broadcast, as [B, n, 1]."""
    return (1 - t) * x + t * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """Velocity dF/dt of the path, what the network learns."""
    return noise - x


def logit_normal(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Times in (0, 1): sigmoid of standard normal draws of the global stream."""
    return torch.randn(*shape, device=device).sigmoid()


def mode_times(u: Tensor, scale: float) -> Tensor:
    """Times of uniform draws u: 1 - u - scale (cos^2(pi u / 2) - 1 + u); even at scale 0 (arXiv 2403.03206)."""
    return 1 - u - scale * (torch.cos(torch.pi * u / 2).square() - 1 + u)


@dataclass(frozen=True)
class Times:
    """How the times of training are drawn; `stratified`: one from each of B equal parts, for a batch of B.

    `mean` of the normal shifts logit-normal times towards noise, where redundant data (pixels) are still uncertain.
    """

    law: TimeLaw = "logit_normal"
    mode_scale: float = 0.0
    stratified: bool = False
    mean: float = 0.0

    def __post_init__(self) -> None:
        if self.law not in get_args(TimeLaw):
            raise ValueError(f"law of times is {self.law!r}; it must be one of {', '.join(get_args(TimeLaw))}")

    def draw(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Times in (0, 1), [B], of the global stream."""
        if self.law == "logit_normal" and not self.stratified:
            return (torch.randn(batch, device=device) + self.mean).sigmoid()
        u = torch.rand(batch, device=device)
        if self.stratified:
            u = (torch.randperm(batch, device=device) + u) / batch
        if self.law == "mode":
            return mode_times(u, self.mode_scale)
        tiny = torch.finfo(u.dtype).eps
        return (sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + tiny, 1 - tiny)) + self.mean).sigmoid()
