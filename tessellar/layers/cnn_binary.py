"""Convolutional encoder and decoder of binary tokenizers: Open-MAGVIT2 (arXiv 2409.04410), WeTok,
BitDance (arXiv 2602.14041).

As the VQGAN's halves (cnn.py) without attention and without biases inside of blocks; as many blocks
in the middle as at a level, downsampling padded on all sides. The decoder is modulated at each
level by statistics of the codes (cnn_adaptive.py).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.cnn import Level, ResBlock, Sizes, group_norm
from tessellar.layers.cnn_adaptive import AdaptiveLevel


def plain_blocks(channels: int, count: int) -> nn.Sequential:
    """`count` residual blocks without biases."""
    return nn.Sequential(*(ResBlock(channels, channels, bias=False) for _ in range(count)))


class BinaryEncoder(nn.Module):
    """Images [B, 3, H, W] to features [B, z_channels, H / f, W / f], f = 2^(levels - 1)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        previous = sizes.channels
        for i, width in enumerate(widths):  # the finest level first
            level = Level(
                previous,
                width,
                sizes.num_res_blocks,
                attention=False,
                resample=None if i == last else nn.Conv2d(width, width, 3, stride=2, padding=1),
                dropout=0.0,
                bias=False,
            )
            self.levels.append(level)
            previous = width
        self.mid = plain_blocks(widths[-1], sizes.num_res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images.contiguous())
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class BinaryDecoder(nn.Module):
    """Codes [B, z_channels, h, w] to images; levels run from the coarsest to the finest.

    `in_channels` enter the first convolution (default: the codes alone), where noise stands beside
    the codes; the codes alone modulate.
    """

    def __init__(self, sizes: Sizes, in_channels: int | None = None) -> None:
        super().__init__()
        widths = sizes.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels or sizes.z_channels, widths[0], 3, padding=1)
        self.mid = plain_blocks(widths[0], sizes.num_res_blocks)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):  # the coarsest level first
            level = AdaptiveLevel(
                previous,
                width,
                sizes.z_channels,
                sizes.num_res_blocks,
                upsample=i < last,
                bias=False,
            )
            self.levels.append(level)
            previous = width
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, codes: Tensor, noise: Tensor | None = None) -> Tensor:
        """`noise` [B, in_channels - z_channels, h, w] stands behind the codes."""
        h = codes if noise is None else torch.cat([codes, noise], 1)
        h = self.mid(self.conv_in(h.contiguous()))
        for level in self.levels:
            h = level(h, codes)
        return self.conv_out(F.silu(self.norm_out(h)))
