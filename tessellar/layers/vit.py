"""The plain pre-norm vision transformer block (ViT, arXiv 2010.11929), with residual outputs that
start at zero; and tables of positions on other grids.
"""

from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention as attend
from tessellar.layers.tags import tag


class ViTBlock(nn.Module):
    """x += Attention(LN x); x += MLP(LN x), on [B, N, D]; `gelu` is its approximation ("none":
    exact).

    `causal`: a row attends to itself and to rows before it. `exact_attention`: scores and weights
    are computed in float32 in any run (AliTok's).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        gelu: str = "tanh",
        causal: bool = False,
        exact_attention: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}")
        self.num_heads = num_heads
        self.implementation = attention
        self.gelu = gelu
        self.causal = causal
        self.exact_attention = exact_attention
        hidden = int(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            tag(linear.weight, "hidden")
        for linear in (self.proj, self.fc2):
            nn.init.zeros_(linear.weight)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, is_causal=self.causal, implementation=self.implementation)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if self.exact_attention:
            with torch.autocast(x.device.type, enabled=False):
                out = self._attend(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            out = self._attend(q, k, v)
        x = x + self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x)), approximate=self.gelu))


def positions_on(table: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """A table of positions [1, h w, D] of one grid on another, bicubically; gradients pass."""
    if other == grid:
        return table
    maps = rearrange(table, "1 (h w) d -> 1 d h w", h=grid[0])
    resized = F.interpolate(maps.float(), size=other, mode="bicubic").to(table.dtype)
    return rearrange(resized, "1 d h w -> 1 (h w) d")


def resized_positions(table: Tensor, prefix: int, side: int) -> Tensor:
    """A table of positions [1, prefix + h w, D] of a square grid on one of `side` x `side`,
    bicubically; the `prefix` stays.

    As DINO's and CLIP's code has it, the factor (side + 0.1) / h decides where the table is sampled:
    without the 0.1 a rounded factor could lose the last row.
    """
    own = isqrt(table.shape[1] - prefix)
    if own == side:
        return table
    maps = rearrange(table[:, prefix:], "b (h w) d -> b d h w", h=own)
    factor = (side + 0.1) / own
    resized = F.interpolate(maps.contiguous(), scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:, :prefix], rearrange(resized, "b d h w -> b (h w) d")], dim=1)
