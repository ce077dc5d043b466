"""The Llama block and its parts: rotary positions, stochastic depth, SwiGLU, attention; RMSNorm, no
biases (arXiv 2302.13971, LlamaGen's sizes).

Rotations turn pairs of adjacent channels (RoFormer, arXiv 2104.09864); in two dimensions, as in
LlamaGen (arXiv 2406.06525), the first half of the pairs turns with the row, the second half with
the column. Stochastic depth (arXiv 1603.09382) is here because timm's DropPath would load
torchvision, which costs seconds where only a generator is needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag


def frequencies(pairs: int, base: float = 10000.0) -> Tensor:
    """base^(-j / pairs) for j = 0 .. pairs - 1, float32 [pairs]."""
    return 1.0 / base ** (torch.arange(pairs, dtype=torch.float32) / pairs)


def grid_angles(rows: Tensor, columns: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles [N, head_dim / 2] of positions `rows`, `columns` [N]: row angles, then column angles."""
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; two-dimensional rotation needs a multiple of 4")
    freqs = frequencies(head_dim // 4, base).to(rows.device)
    return torch.cat([rows[:, None] * freqs, columns[:, None] * freqs], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j + 1) of x [B, H, n, D] by cos, sin [B or 1, n, D / 2]; computed in
    float32, of float64 in float64.

    One complex product: a third of the memory traffic of the four real ones.
    """
    pairs = torch.view_as_complex(
        rearrange(at_least_float32(x), "b h n (d two) -> b h n d two", two=2).contiguous()
    )
    rotated = torch.view_as_real(pairs * torch.complex(cos, sin)[:, None])
    return rearrange(rotated, "b h n d two -> b h n (d two)").to(x.dtype)


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


class Positions(NamedTuple):
    """Rotation cos, sin [R or 1, n, head_dim / 2]; `bias` [R or 1, n, D] is added to q and k
    (Hita).
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor | None = None


class Pass(NamedTuple):
    """What all blocks of one forward pass share."""

    positions: Positions
    cache: KVCache | NoCache | PlacedCache
    slots: Slots


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """int(8 width / 3), rounded up to a multiple."""
    return -(-int(8 * width / 3) // multiple_of) * multiple_of


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(width, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PackedSwiGLU(nn.Module):
    """w2(SiLU(a) * b), a and b the halves of w1 x; from `width` to `out` channels, with biases."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 2 * hidden)
        self.w2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


@dataclass(frozen=True)
class AttentionKind:
    """What a block's attention has beyond Llama's: biases of its projections, dropout of attention
    weights, and queries and keys that are RMS-normed per head, before they are rotated, with an
    epsilon of their own (None: the block's).
    """

    bias: bool = False
    dropout: float = 0.0
    qk_norm: bool = False
    qk_norm_eps: float | None = None


class LlamaAttention(nn.Module):
    """Multi-head attention with a fused projection, rows q | k | v, each head-major.

    With `num_kv_heads` below `num_heads`, groups of queries share a key and a value (arXiv
    2305.13245). `qk_norm_eps` None: queries and keys are not normed.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        implementation: str = "auto",
        bias: bool = False,
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.dropout = dropout
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(width // num_heads, eps=qk_norm_eps)
            self.k_norm = nn.RMSNorm(width // num_heads, eps=qk_norm_eps)
        self.group = num_heads // (num_kv_heads or num_heads)
        self.sizes = (width, width // self.group, width // self.group)
        self.wqkv = nn.Linear(width, sum(self.sizes), bias=bias)
        self.wo = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        positions = shared.positions
        q, k, v = self.wqkv(x).split(self.sizes, dim=-1)
        if positions.bias is not None:
            q = q + positions.bias
            k = k + positions.bias
        q = rearrange(q, "b n (h d) -> b h n d", h=self.num_heads)
        k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads // self.group) for t in (k, v)
        )
        q = rotate(self.q_norm(q), positions.cos, positions.sin)
        k = rotate(self.k_norm(k), positions.cos, positions.sin)
        k, v = shared.cache.write(layer, shared.slots, k, v)
        if self.group > 1:
            k = k.repeat_interleave(self.group, dim=1)
            v = v.repeat_interleave(self.group, dim=1)
        dropout = self.dropout if self.training else 0.0
        out = attention(
            q, k, v, shared.slots.mask, shared.slots.is_causal, self.implementation, dropout=dropout
        )
        return self.wo(rearrange(out, "b h n d -> b n (h d)"))


class LlamaBlock(nn.Module):
    """Pre-norm attention and SwiGLU with residual dropout and stochastic depth."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        implementation: str = "auto",
        num_kv_heads: int | None = None,
        attention_kind: AttentionKind = AttentionKind(),  # noqa: B008
    ) -> None:
        super().__init__()
        qk_norm_eps = norm_eps if attention_kind.qk_norm_eps is None else attention_kind.qk_norm_eps
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = LlamaAttention(
            width,
            num_heads,
            implementation,
            bias=attention_kind.bias,
            dropout=attention_kind.dropout,
            num_kv_heads=num_kv_heads,
            qk_norm_eps=qk_norm_eps if attention_kind.qk_norm else None,
        )
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.feed_forward = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        x = x + self.drop_path(self.dropout(self.attention(self.attention_norm(x), layer, shared)))
        return x + self.drop_path(self.dropout(self.feed_forward(self.ffn_norm(x))))
