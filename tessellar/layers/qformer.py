"""Q-Former layers: queries read a memory through cross-attention (GigaTok, arXiv 2504.08736; DETR's
placement).

Pre-norm self-attention, cross-attention and MLP. Positions are added to queries and keys of each
attention only: never to values or to the residual stream.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention as attend
from tessellar.layers.tags import tag


class QKVAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from different inputs; weight rows q
    | k | v.
    """

    def __init__(self, width: int, num_heads: int, attention: str = "auto") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}")
        self.num_heads = num_heads
        self.implementation = attention
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        for linear in (self.qkv, self.proj):
            tag(linear.weight, "hidden")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, n, D] attends to k, v [B, S, D] where `mask` (broadcasting to [B, H, n, S]) is
        True.
        """
        projected = []
        weights = self.qkv.weight.chunk(3)
        biases = self.qkv.bias.chunk(3)
        for x, weight, bias in zip((q, k, v), weights, biases, strict=True):
            y = F.linear(x, weight, bias)
            projected.append(rearrange(y, "b n (h d) -> b h n d", h=self.num_heads))
        q, k, v = projected
        out = attend(q, k, v, mask, implementation=self.implementation)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class QFormerLayer(nn.Module):
    """x += SelfAttention(LN x); x += CrossAttention(LN x, memory); x += MLP(LN x), with an exact
    GELU.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: int = 4, attention: str = "auto"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.self_attention = QKVAttention(width, num_heads, attention)
        self.cross_attention = QKVAttention(width, num_heads, attention)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        for linear in (self.fc1, self.fc2):
            tag(linear.weight, "hidden")

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Tensor,
        memory_positions: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Queries x [B, n, D] at `positions` [n, D] read `memory` [B, S, D] at `memory_positions`
        [S, D].

        `mask` [B, S] hides parts of the memory (True = visible).
        """
        h = self.norm1(x)
        x = x + self.self_attention(h + positions, h + positions, h)
        visible = None if mask is None else mask[:, None, None]
        x = x + self.cross_attention(
            self.norm2(x) + positions, memory + memory_positions, memory, visible
        )
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))
