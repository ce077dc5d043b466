"""Multi-head attention through the cache of a pass, without rotations: what FlexAR, LPD and the
modulated blocks of RAR and TokenBridge share.
"""

from typing import Protocol

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention as attend
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots


class CachedPass(Protocol):
    """What all blocks of a pass share, as far as attention reads it."""

    @property
    def cache(self) -> KVCache | NoCache | PlacedCache: ...

    @property
    def slots(self) -> Slots: ...


class CachedAttention(nn.Module):
    """Attention with a fused projection, rows q | k | v, each head-major.

    `dropout` is that of the projected output, `weight_dropout` that of attention weights.
    `qk_norm_eps`: queries and keys have a LayerNorm per head; None: none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        bias: bool = True,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        qk_norm_eps: float | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.dropout = dropout
        self.weight_dropout = weight_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm_eps is not None:
            self.q_norm = nn.LayerNorm(width // num_heads, eps=qk_norm_eps)
            self.k_norm = nn.LayerNorm(width // num_heads, eps=qk_norm_eps)

    def forward(self, x: Tensor, layer: int, shared: CachedPass) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        slots = shared.slots
        k, v = shared.cache.write(layer, slots, self.k_norm(k), v)
        out = attend(
            self.q_norm(q).to(k.dtype),
            k,
            v,
            mask=slots.mask,
            is_causal=slots.is_causal,
            implementation=self.implementation,
            dropout=self.weight_dropout if self.training else 0.0,
        )
        out = self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return F.dropout(out, self.dropout, training=self.training)
