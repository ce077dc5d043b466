"""Convolutional encoder and decoder of the VQGAN family (arXiv 2012.09841, LDM's layout).

Residual blocks behind GroupNorm and SiLU, downsampling padded at the right and bottom only,
attention over the whole map at chosen levels and in the middle. Shared by LlamaGen's VQGAN and
MAR's KL VAE.
"""

from collections.abc import Collection
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions behind norms and SiLU, added to the input (1x1 where the channels change)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        dropout: float = 0.0,
        groups: int = 32,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.dropout = nn.Dropout(dropout)
        changes = channels != out_channels
        self.shortcut = nn.Conv2d(channels, out_channels, 1, bias=bias) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all positions of the map."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = rearrange(self.q(h), "b c h w -> b (h w) c")
        k = rearrange(self.k(h), "b c h w -> b (h w) c")
        v = rearrange(self.v(h), "b c h w -> b (h w) c")
        out = F.scaled_dot_product_attention(q, k, v)
        # contiguous: GroupNorm on CPU loses precision on transposed memory
        return x + self.proj(rearrange(out, "b (h w) c -> b c h w", h=x.shape[2]).contiguous())


class Downsample(nn.Module):
    """Stride-2 convolution on a map padded by one zero row below and one zero column on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks (with attention after each, if wanted), then a change of resolution."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        resample: nn.Module | None,
        dropout: float,
        groups: int = 32,
        bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.res = nn.ModuleList(
            ResBlock(a, b, dropout, groups, bias) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(out_channels, groups) for _ in range(blocks if attention else 0)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x if self.resample is None else self.resample(x)


def middle(
    channels: int, dropout: float, attention: bool = True, groups: int = 32
) -> nn.Sequential:
    blocks = [ResBlock(channels, channels, dropout, groups) for _ in range(2)]
    return nn.Sequential(
        blocks[0], *([SpatialAttention(channels, groups)] if attention else []), blocks[1]
    )


class Sizes(NamedTuple):
    """What encoder and decoder share; `z_channels` leave the encoder or enter the decoder; norms
    have `groups`.
    """

    channels: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dropout: float = 0.0
    groups: int = 32

    @property
    def widths(self) -> list[int]:
        return [self.channels * m for m in self.multipliers]

    def decoding(self, multipliers: tuple[int, ...] | None) -> "Sizes":
        """The decoder's, with other multipliers (None: the same); raises ValueError for another
        number of levels.
        """
        if multipliers is None:
            return self
        if len(multipliers) != len(self.multipliers):
            raise ValueError(
                f"decoder_multipliers {tuple(multipliers)} must be {len(self.multipliers)} levels"
            )
        return self._replace(multipliers=tuple(multipliers))


class Encoder(nn.Module):
    """Images [B, 3, H, W] to features [B, z_channels, H / f, W / f], f = 2^(levels - 1).

    `attention` are the levels with attention after each block, 0 the finest; None: the coarsest
    alone.
    """

    def __init__(
        self, sizes: Sizes, attention: Collection[int] | None = None, middle_attention: bool = True
    ) -> None:
        super().__init__()
        widths = sizes.widths
        last = len(sizes.widths) - 1
        attention = (last,) if attention is None else attention
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        previous = sizes.channels
        for i, width in enumerate(widths):  # the finest level first
            level = Level(
                previous,
                width,
                sizes.num_res_blocks,
                attention=i in attention,
                resample=None if i == last else Downsample(width),
                dropout=sizes.dropout,
                groups=sizes.groups,
            )
            self.levels.append(level)
            previous = width
        self.mid = middle(widths[-1], sizes.dropout, middle_attention, sizes.groups)
        self.norm_out = group_norm(widths[-1], sizes.groups)
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] to images; levels run from the coarsest to the finest,
    `attention` as above.
    """

    def __init__(self, sizes: Sizes, attention: Collection[int] | None = None) -> None:
        super().__init__()
        widths = sizes.widths[::-1]
        last = len(widths) - 1
        attention = (last,) if attention is None else attention
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], sizes.dropout, groups=sizes.groups)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):  # the coarsest level first
            level = Level(
                previous,
                width,
                sizes.num_res_blocks + 1,
                attention=last - i in attention,
                resample=None if i == last else Upsample(width),
                dropout=sizes.dropout,
                groups=sizes.groups,
            )
            self.levels.append(level)
            previous = width
        self.norm_out = group_norm(widths[-1], sizes.groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
