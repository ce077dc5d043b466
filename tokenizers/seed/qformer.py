"""SEED's Q-Former (arXiv 2307.08041): BERT's layers, norms behind each branch, in which queries read an
image through cross-attention, each query seeing itself and those before it.

Texts take the same attention and a feed-forward of their own, where there is one (`TextEmbedding`);
only the contrastive stage has it. Different from the official code: causality is said, not guessed
from the number of queries.

Shapes: queries [B, n, D], texts [B, T, D], memory [B, S, M]. Masks are True where a row sees a column.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention as attend
from tessellar.layers.tags import tag

EPS = 1e-12
EVERY = 2  # layers from one cross-attention to the next, the first layer included


class ReadingAttention(nn.Module):
    """LN(x + Attention(x, memory)): BERT's self-attention where the memory is x."""

    def __init__(
        self, width: int, num_heads: int, memory_dim: int, dropout: float, attention: str
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = attention
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_dim, width)
        self.value = nn.Linear(memory_dim, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        split = "b n (h d) -> b h n d"
        q = rearrange(self.query(x), split, h=self.num_heads)
        k = rearrange(self.key(memory), split, h=self.num_heads)
        v = rearrange(self.value(memory), split, h=self.num_heads)
        rate = self.dropout.p if self.training else 0.0
        out = attend(q, k, v, mask=mask, implementation=self.implementation, dropout=rate)
        out = self.out(rearrange(out, "b h n d -> b n (h d)"))
        return self.norm(self.dropout(out) + x)


class FeedForward(nn.Module):
    """LN(x + MLP(x))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.fc2(F.gelu(self.fc1(x)))) + x)


class QFormerBlock(nn.Module):
    """Self-attention, cross-attention of the queries where `reads`, and a feed-forward for queries and
    for texts each.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        memory_dim: int,
        reads: bool,
        has_text: bool,
        dropout: float,
        attention: str,
    ) -> None:
        super().__init__()
        self.attention = ReadingAttention(width, num_heads, width, dropout, attention)
        self.cross_attention = None
        if reads:
            self.cross_attention = ReadingAttention(
                width, num_heads, memory_dim, dropout=dropout, attention=attention
            )
        self.of_queries = FeedForward(width, hidden, dropout)
        self.of_texts = FeedForward(width, hidden, dropout) if has_text else None
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                tag(linear.weight, "hidden")

    def forward(self, x: Tensor, count: int, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        """x holds `count` queries, then texts."""
        x = self.attention(x, x, mask)
        queries = x[:, :count]
        texts = x[:, count:]
        parts = []
        if count:
            assert memory is not None
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, memory)
            parts.append(self.of_queries(queries))
        if texts.shape[1]:
            assert self.of_texts is not None
            parts.append(self.of_texts(texts))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class TextEmbedding(nn.Module):
    """Ids [B, T] to [B, T, D], at most `length` of them, padded on the right."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.positions.weight):
            raise UserError(
                f"texts have {ids.shape[1]} tokens; this Q-Former reads {len(self.positions.weight)}"
            )
        return self.words(ids) + self.positions.weight[: ids.shape[1]]


class CausalQFormer(nn.Module):
    """`depth` blocks; memory of `memory_dim` channels; texts of `text_vocab` ids where it is given."""

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        memory_dim: int,
        text_vocab: int | None = None,
        text_length: int = 512,
        dropout: float = 0.1,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"{num_heads} heads do not divide the Q-Former's width {width}")
        self.text = None
        if text_vocab is not None:
            self.text = TextEmbedding(text_vocab, text_length, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(
                width,
                num_heads,
                hidden=hidden,
                memory_dim=memory_dim,
                reads=number % EVERY == 0,
                has_text=text_vocab is not None,
                dropout=dropout,
                attention=attention,
            )
            for number in range(depth)
        )

    def forward(
        self,
        queries: Tensor | None = None,
        memory: Tensor | None = None,
        ids: Tensor | None = None,
        valid: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Queries [B, n, D] that read a memory, texts `ids` [B, T] with `valid` [B, T], or both: [B, n
        + T, D].

        `causal`: a query sees itself and queries before it. With both, all see the whole text, and
        texts see all queries.
        """
        parts = []
        count = 0
        if queries is not None:
            parts.append(queries)
            count = queries.shape[1]
        if ids is not None:
            if self.text is None:
                raise UserError("this Q-Former has no texts: give it a text_vocab")
            parts.append(self.text(ids))
        x = self.dropout(self.norm(torch.cat(parts, 1)))
        mask = visibility(count, x.shape[1], valid, causal, x.device)
        for block in self.blocks:
            x = block(x, count, memory, mask)
        return x


def visibility(
    count: int, length: int, valid: Tensor | None, causal: bool, device: torch.device
) -> Tensor | None:
    """Who sees whom of `count` queries and the texts behind them, [B or 1, 1, length, length]; None:
    all see all.

            queries      texts
    queries triangle     valid
    texts   all          valid
    """
    if not (causal and count > 1) and valid is None:
        return None
    mask = torch.ones(1, length, length, dtype=torch.bool, device=device)
    if causal:
        mask[:, :count, :count] = mask[0, :count, :count].tril()
    if valid is not None:
        seen = torch.ones(len(valid), length, dtype=torch.bool, device=device)
        seen[:, count:] = valid.bool()
        mask = mask & seen[:, None]
    return mask[:, None]
