"""Stochastic depth (arXiv 1603.09382): a residual branch is dropped for whole samples in training.

timm's DropPath would serve, but importing timm loads torchvision, which costs seconds where only a
generator is needed.
"""

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Zero a branch [B, ...] with probability `rate` a sample and scale the others by 1 / (1 -
    rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)
