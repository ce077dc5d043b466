"""Embedding of a diffusion or flow time: sinusoids, then a small MLP (ADM, arXiv 2105.05233; MAR, xAR, DiT)."""

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, channels: int, period: float = 10000.0) -> Tensor:
    """[..., channels] of times [...]: cosines, then sines, of t period^(-i / half); float32. `channels` is even."""
    half = channels // 2
    frequencies = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Times [...] (as the model counts them, 0 to 1000 in most) to [..., width]."""

    def __init__(self, width: int, channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.fc1, self.fc2 = nn.Linear(channels, width), nn.Linear(width, width)
        self.act = nn.SiLU()

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(sinusoid(t, self.channels).to(self.fc1.weight.dtype))))
