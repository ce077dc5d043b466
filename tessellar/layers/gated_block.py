"""Pre-norm transformer block with a gated MLP of packed weights (DINOv2's SwiGLU), bidirectional or
causal: Hita's.
"""

from einops import rearrange
from timm.layers.mlp import GluMlp
from torch import Tensor, nn

from tessellar.layers.attention import attention as attend
from tessellar.layers.tags import tag


def packed_hidden(mlp_dim: int) -> int:
    """Two thirds of `mlp_dim`, rounded up to a multiple of 8."""
    return 8 * ((2 * mlp_dim // 3 + 7) // 8)


class GatedAttention(nn.Module):
    """Multi-head attention; queries, keys and values have biases if `bias`, the output always."""

    def __init__(
        self, width: int, num_heads: int, bias: bool, attention_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rate = attention_dropout
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(self.k(x), "b n (h d) -> b h n d", h=self.num_heads)
        v = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.num_heads)
        out = attend(q, k, v, mask, is_causal, dropout=self.rate if self.training else 0.0)
        return self.dropout(self.out(rearrange(out, "b h n d -> b n (h d)")))


class GatedBlock(nn.Module):
    """x += Attention(LN x); x += SwiGLU(LN x), on [B, n, D]; `mask` [n, n] is True where a row sees
    a column.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attention = GatedAttention(width, num_heads, bias, attention_dropout, dropout)
        self.mlp = GluMlp(width, 2 * hidden, act_layer=nn.SiLU, gate_last=False)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, is_causal)
        return x + self.mlp(self.norm2(x))
