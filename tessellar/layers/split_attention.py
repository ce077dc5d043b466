"""Attention with a matrix each for queries, keys and values: FlexTok's (arXiv 2502.13967), to the
sequence itself, and its generator's, to a text.
"""

from einops import rearrange
from torch import Tensor, nn

from tessellar.layers.attention import attention as attend


class SplitAttention(nn.Module):
    """Multi-head attention without biases, of x [B, n, D] to itself or to a memory [B, S, D].

    `head_norm` norms the queries and keys of each head; `scale` is that of the scores, by default
    one over the root of a head's channels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_norm: nn.Module | None = None,
        scale: float | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.implementation = implementation
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.head_norm = head_norm

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`mask` (broadcasting to [B, H, n, S]) is True where a row sees a column."""
        memory = x if memory is None else memory
        q = rearrange(self.wq(x), "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(self.wk(memory), "b n (h d) -> b h n d", h=self.num_heads)
        v = rearrange(self.wv(memory), "b n (h d) -> b h n d", h=self.num_heads)
        if self.head_norm is not None:
            q = self.head_norm(q).to(v.dtype)
            k = self.head_norm(k).to(v.dtype)
        out = attend(q, k, v, mask, implementation=self.implementation, scale=self.scale)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
