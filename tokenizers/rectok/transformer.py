"""RecTok's transformers (arXiv 2512.13421): RMSNorm, SwiGLU, and attention with the two-dimensional
table of its official code.

Sizes: x [B, n, D] of n of the N places of a grid in raster order, `places` [B, n] which (None: all).
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention as attend
from tessellar.layers.precision import ExactTables
from tessellar.layers.tags import tag
from tessellar.tokenizers.titok.tokenizer import ViTSize


def rope_table(side: int, head_dim: int) -> Tensor:
    """Angles [N, head_dim] of a grid: rows in the first half of the channels, columns in the second.

    Each half repeats its frequencies as a whole, while `twist` turns adjacent channels: the two
    channels of a pair have different angles, so it is no pure rotation, as in the official code.
    """
    frequencies = 7.0 * 1e4 ** -torch.linspace(0, 1, head_dim // 4)
    along = 2 * math.pi * torch.linspace(0, 1, side)[:, None] * frequencies.repeat(2)
    rows = repeat(along, "h d -> (h w) d", w=side)
    columns = repeat(along, "w d -> (h w) d", h=side)
    return torch.cat([rows, columns], dim=-1)


def twist(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + x' sin of x [B, H, n, d], where x' has (-b, a) for each adjacent pair (a, b)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Block(nn.Module):
    """x += Attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, size: ViTSize, qk_norm: bool, attention: str) -> None:
        super().__init__()
        width = size.width
        hidden = int(8 * width / 3)
        self.num_heads = size.num_heads
        self.implementation = attention
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        head_dim = width // size.num_heads
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b n (t h d) -> t b h n d", t=3, h=self.num_heads
        )
        q = twist(self.q_norm(q), cos, sin)
        k = twist(self.k_norm(k), cos, sin)
        out = attend(q, k, v, implementation=self.implementation)
        x = x + self.proj(rearrange(out, "b h n d -> b n (h d)"))
        gate, value = self.w12(self.norm2(x)).chunk(2, dim=-1)
        return x + self.w3(F.silu(gate) * value)


class Transformer(ExactTables):
    """Positions, a norm, blocks, a norm."""

    def __init__(self, side: int, size: ViTSize, qk_norm: bool, attention: str) -> None:
        super().__init__()
        self.positions = tag(nn.Parameter(torch.empty(1, side**2, size.width)), "no_decay")
        self.norm_in = nn.RMSNorm(size.width, eps=1e-6)
        self.blocks = nn.ModuleList(Block(size, qk_norm, attention) for _ in range(size.depth))
        self.norm_out = nn.RMSNorm(size.width, eps=1e-6)
        angles = rope_table(side, size.width // size.num_heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def run(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        cos = self.cos
        sin = self.sin
        positions = self.positions
        if places is not None:
            cos = cos[places][:, None]
            sin = sin[places][:, None]
            positions = positions[0][places]
        x = self.norm_in(x + positions)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm_out(x)


class Encoder(Transformer):
    """Images [B, 3, H, W] to moments [B, n, 2 C] of the patches at `places`."""

    def __init__(
        self, side: int, patch_size: int, size: ViTSize, dim: int, qk_norm: bool, attention: str
    ) -> None:
        super().__init__(side, size, qk_norm, attention)
        self.patch_size = patch_size
        self.patch_in = nn.Linear(3 * patch_size**2, size.width)
        self.to_moments = nn.Linear(size.width, 2 * dim)

    def forward(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        p = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        if places is not None:
            patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
        return self.to_moments(self.run(self.patch_in(patches), places))


class Reader(Transformer):
    """Latents [B, n, C] at `places` to states [B, N, D]: a learned vector stands where none is."""

    def __init__(self, side: int, size: ViTSize, dim: int, qk_norm: bool, attention: str) -> None:
        super().__init__(side, size, qk_norm, attention)
        self.from_latent = nn.Linear(dim, size.width)
        self.hidden = tag(nn.Parameter(torch.empty(1, 1, size.width)), "no_decay")

    def states(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        x = self.from_latent(latents.to(self.from_latent.weight.dtype))
        if places is not None:
            empty = self.hidden.expand(len(x), self.positions.shape[1], -1).to(x.dtype)
            x = empty.scatter(1, places[..., None].expand(-1, -1, x.shape[-1]), x)
        return self.run(x)


class PixelDecoder(Reader):
    """Latents [B, n, C] to images [B, 3, H, W]."""

    def __init__(
        self, side: int, patch_size: int, size: ViTSize, dim: int, qk_norm: bool, attention: str
    ) -> None:
        super().__init__(side, size, dim, qk_norm, attention)
        self.side = side
        self.patch_size = patch_size
        self.to_pixels = nn.Linear(size.width, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        p = self.patch_size
        pixels = self.to_pixels(self.states(latents, places))
        images = rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)
        return self.conv_out(images.contiguous())


class SemanticDecoder(Reader):
    """Latents [B, n, C] to features [B, N, `out`] of a vision model."""

    def __init__(
        self, side: int, size: ViTSize, dim: int, out: int, qk_norm: bool, attention: str
    ) -> None:
        super().__init__(side, size, dim, qk_norm, attention)
        self.out = nn.Linear(size.width, out)

    def forward(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        return self.out(self.states(latents, places))
