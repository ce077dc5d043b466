"""TiTok's discriminator (arXiv 2406.07550): blurred downsampling, group norm, logits on a fixed
grid.

From MaskBit (arXiv 2409.16211) by way of TiTok's repository. Takes images in [-1, 1] and shows [0,
1] to its layers, as the published training did.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.protocol.arguments import SIGNED
from tessellar.protocol.configured import Configured


class Blur(nn.Module):
    """Each channel with the outer square of `kernel`, normalised, at stride 2: half the size."""

    kernel: Tensor

    def __init__(self, kernel: tuple[float, ...]) -> None:
        super().__init__()
        line = torch.tensor(kernel, dtype=torch.float32)
        square = torch.outer(line, line)
        self.register_buffer("kernel", (square / square.sum())[None, None])
        self.padding = (len(kernel) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, weight, stride=2, padding=self.padding, groups=x.shape[1])


class BlurDiscriminator(Configured, nn.Module):
    """Images [B, 3, H, W] to logits [B, 1, pool, pool], whatever the size. 1,909,889 parameters at
    the defaults.
    """

    ranges: ClassVar = {"kernel": SIGNED}  # a filter, where the others' are sides

    def __init__(
        self,
        channels: int = 128,
        stages: int = 3,
        pool: int = 16,
        kernel: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0),
    ) -> None:
        super().__init__()
        self.pool = pool
        self.first = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1))
        widths = [channels, *(channels * 2**stage for stage in range(stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1),
                Blur(kernel),
                nn.GroupNorm(32, width),
                nn.LeakyReLU(0.1),
            )
            for before, width in zip(widths, widths[1:], strict=False)
        )
        last = widths[-1]
        self.to_logits = nn.Sequential(
            nn.Conv2d(last, last, 1), nn.LeakyReLU(0.1), nn.Conv2d(last, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        h = self.first(((images + 1) / 2).contiguous())
        for stage in self.stages:
            h = stage(h)
        return self.to_logits(F.adaptive_max_pool2d(h, (self.pool, self.pool)))
