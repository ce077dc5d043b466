"""Convolutional decoder with adaptive GroupNorm and depth-to-space upsampling (MAGVIT-v2, arXiv
2310.05737; GigaTok).

At each resolution the decoder's input modulates: its spatial deviation scales, its mean shifts.
GroupNorm on the CPU loses precision on memory that is not contiguous, so what comes out of a
rearrangement is made contiguous.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.cnn import ResBlock, Sizes, group_norm, middle

EPS = 1e-6


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm without weights, scaled and shifted by statistics of a style map."""

    def __init__(self, channels: int, style_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=EPS, affine=False)
        self.gamma = nn.Linear(style_channels, channels)
        self.beta = nn.Linear(style_channels, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [B, C, H, W], style [B, S, h, w]; the variance over positions is the unbiased one."""
        flat = rearrange(style, "b s h w -> b s (h w)")
        scale = self.gamma((flat.var(-1) + EPS).sqrt())
        shift = self.beta(flat.mean(-1))
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]


class DepthToSpace(nn.Module):
    """A convolution to four times the channels, which become 2 x 2 pixels; channel order (dy, dx,
    c).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "b (p q c) h w -> b c (h p) (w q)", p=2, q=2).contiguous()


class AdaptiveLevel(nn.Module):
    """Adaptive norm, residual blocks, and upsampling but at the finest level."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style_channels: int,
        blocks: int,
        upsample: bool,
        bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.adaptive = AdaptiveGroupNorm(channels, style_channels)
        self.res = nn.ModuleList(
            ResBlock(a, b, bias=bias) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.upsample = DepthToSpace(out_channels) if upsample else None

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.adaptive(x, style)
        for block in self.res:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class AdaptiveDecoder(nn.Module):
    """Features [B, z_channels, h, w] to images; levels run from the coarsest to the finest."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths[::-1]
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], sizes.dropout, attention=False)
        self.levels = nn.ModuleList(
            AdaptiveLevel(
                previous, width, sizes.z_channels, sizes.num_res_blocks + 1, i < len(widths) - 1
            )
            for i, (previous, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for level in self.levels:
            h = level(h, features)
        return self.conv_out(F.silu(self.norm_out(h)))
