"""The Llama block: RMSNorm, attention with rotary positions, SwiGLU; no biases (arXiv 2302.13971,
LlamaGen's sizes).
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention
from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.layers.rope import rotate
from tessellar.layers.stochastic_depth import StochasticDepth
from tessellar.layers.tags import tag


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
    cache: KVCache | NoCache
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


class LlamaAttention(nn.Module):
    """Multi-head attention with a fused projection, rows q | k | v, each head-major.

    With `num_kv_heads` below `num_heads`, groups of queries share a key and a value (arXiv
    2305.13245).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        implementation: str = "auto",
        bias: bool = False,
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.dropout = dropout
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
        q = rotate(q, positions.cos, positions.sin)
        k = rotate(k, positions.cos, positions.sin)
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
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = LlamaAttention(width, num_heads, implementation, num_kv_heads=num_kv_heads)
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.feed_forward = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        x = x + self.drop_path(self.dropout(self.attention(self.attention_norm(x), layer, shared)))
        return x + self.drop_path(self.dropout(self.feed_forward(self.ffn_norm(x))))
