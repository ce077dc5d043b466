"""Embedding of a diffusion or flow time: sinusoids, then a small MLP (ADM, arXiv 2105.05233; MAR,
xAR, DiT).

At t = 1000 the last bit of a frequency moves the embedding by 1e-5, and the float32 exp of
different processors rounds near ties differently. So frequencies are made in float64: correctly
rounded to float32, which all agree on, except near ties, where the exact value is at most half a
bit from either neighbour. The result is the same on every machine. Where a replay needs the official
float32 bit for bit, `exact` False takes this machine's.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

NEAR_TIE = 0.475  # of a float32 spacing: vector exps in use err by up to 0.525


@lru_cache(maxsize=16)
def frequencies(count: int, period: float, device: torch.device, exact: bool = True) -> Tensor:
    """period^(-i / count) as the official exp(-ln(period) i / count) gives it, float64 [count]."""
    argument = -math.log(period) * torch.arange(count, dtype=torch.float32, device="cpu") / count
    if not exact:
        return argument.exp().double().to(device)
    value = argument.double().exp()
    rounded = value.float()
    spacing = (torch.nextafter(rounded, torch.tensor(torch.inf)) - rounded).double()
    near_tie = (value - rounded).abs() > NEAR_TIE * spacing
    return torch.where(near_tie, value, rounded.double()).to(device)


def sinusoid(t: Tensor, channels: int, period: float = 10000.0, exact: bool = True) -> Tensor:
    """[..., channels] of times [...]: cosines, then sines, of t period^(-i / half); float32.
    `channels` is even.
    """
    table = frequencies(channels // 2, period, t.device, exact)
    angles = (t[..., None].double() * table).float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Times [...] (as the model counts them, 0 to 1000 in most) to [..., width]."""

    def __init__(
        self, width: int, channels: int = 256, period: float = 10000.0, exact: bool = True
    ) -> None:
        super().__init__()
        self.exact = exact
        self.channels = channels
        self.period = period
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, width)
        self.act = nn.SiLU()

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoid(t, self.channels, self.period, self.exact)
        return self.fc2(self.act(self.fc1(waves.to(self.fc1.weight.dtype))))
