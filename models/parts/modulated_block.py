"""Modulated blocks: pre-norm attention and MLP that a condition of each position scales, shifts and
gates (AdaLN-Zero, DiT, arXiv 2212.09748), with normalised queries and keys, behind a cache.

RAR's (arXiv 2411.00776), and those of TokenBridge's channel head (arXiv 2503.16430).
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.tags import tag
from tessellar.models.parts.cached_attention import CachedAttention


class ModulatedPass(NamedTuple):
    """What all blocks of one pass share: the condition [R, n, D] of each position, and the cache.

    `modulations` are those of each block [R, n, 6 D] where they were computed before.
    """

    condition: Tensor
    cache: KVCache | NoCache | PlacedCache
    slots: Slots
    modulations: list[Tensor] | None = None


class ModulatedBlock(nn.Module):
    """x += gate Attention(mod(norm1 x)); x += gate MLP(mod(norm2 x)): shift, scale, gate of each
    branch in turn.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, dropout: float, implementation: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attention = CachedAttention(
            width,
            num_heads,
            dropout=dropout,
            weight_dropout=dropout,
            qk_norm_eps=1e-6,
            implementation=implementation,
        )
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.modulation = Modulation(width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.attention.qkv, self.attention.proj, self.fc1, self.fc2):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: ModulatedPass) -> Tensor:
        if shared.modulations is None:
            parts = self.modulation(shared.condition)
        else:
            parts = shared.modulations[layer].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(modulate(self.norm1(x), scale1, shift1), layer, shared)
        hidden = self.dropout(F.gelu(self.fc1(modulate(self.norm2(x), scale2, shift2))))
        return x + gate2 * self.dropout(self.fc2(hidden))
