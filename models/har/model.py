"""HAR: hierarchical autoregression, ResTok's generator: a few tokens one by one, then a whole level
a step.

arXiv 2601.03955. N and A (tokens drawn one at a time) are powers of two; levels A, 2A, .., N/2
follow. A level reads the tokens of the level before it once, then special tokens up to its own
length; its positions see each other and everything before. One-dimensional rotation by sequence
index, the class at 0.
"""

from math import log2

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.llama import frequencies
from tessellar.layers.tags import tag
from tessellar.models.parts.llama import (
    SIZE_B,
    SIZE_L,
    SIZE_XL,
    SIZE_XXL,
    ClassPrefix,
    LlamaGenerator,
)
from tessellar.protocol.entities import Entities, levels
from tessellar.protocol.generator import require_categorical
from tessellar.protocol.layout import Layout


def level_sizes(length: int, first: int) -> tuple[int, ...]:
    """`first` tokens alone, then levels that double: (1,) * A + (A, 2A, .., N / 2).

    Raises UserError unless both are powers of two, with 2 A at most N.
    """
    if first < 1 or length < 2 * first or length & (length - 1) or first & (first - 1):
        raise UserError(
            f"HAR needs a power of two of tokens, and of first ones, at most half: not {length}, {first}"
        )
    return (1,) * first + tuple(first * 2**i for i in range(int(log2(length // first))))


def input_sources(length: int, first: int) -> tuple[Tensor, Tensor]:
    """What places 1 .. N - 1 of the sequence read: a token's number, or -1 and a special token's
    number.
    """
    # N = 16, A = 4; place p is the input of token p, tokens 2^k .. 2^(k+1) - 1 are a level:
    #
    #   place    0      1  2  3  4 | 5  6  7 | 8  9  10 11 | 12 13 14 15
    #   reads    class  t0 t1 t2 t3| s0 s1 s2| t4 t5 t6 t7 | s3 s4 s5 s6
    #
    # A level reads the level before it once (half of its own length), then special tokens.
    token = torch.full((length,), -1)
    special = torch.zeros(length, dtype=torch.int64)
    for place in range(1, length):
        start = 1 << (place.bit_length() - 1)  # of the level: the largest power of two
        inside = place - start
        if place <= first:
            token[place] = place - 1
        elif place < 2 * first:
            special[place] = place - first - 1
        elif inside < start // 2:
            token[place] = start // 2 + inside
        else:
            special[place] = inside - 1
    return token[1:], special[1:]


class HAR(LlamaGenerator):
    """Class-conditional next-level generator over a categorical layout of N tokens, `first` of them
    one by one.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        first: int = 4,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        zero_init_residual: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            drop_path=0.0,
            attention=attention,
        )
        self.layout = layout
        self.first = first
        self.entities = levels(layout, level_sizes(layout.length, first))
        vocab = require_categorical(layout, "HAR")
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.token_embedding = nn.Embedding(vocab, width)
        # As published; N / 2 - 1 of them are read.
        self.special_embedding = nn.Embedding(layout.length - 1, width)
        self.output = nn.Linear(width, vocab, bias=False)
        self.token_of, self.special_of = input_sources(layout.length, first)
        # Twice the length: windows of speculative decoding may run past the end.
        places = torch.arange(2 * layout.length)
        angles = places[:, None] * frequencies(self.head_dim // 2, rope_base)
        self.set_rotations(angles.cos(), angles.sin())
        self.init_weights(zero_init_residual)
        for table in (self.conditioning.embedding, self.token_embedding, self.special_embedding):
            tag(table.weight, "no_decay")  # as published

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        index = index.clamp(max=len(self.token_of) - 1)
        token = self.token_of[index].to(tokens.device)
        special = self.special_of[index].to(tokens.device)
        ids = tokens.gather(1, token.clamp(min=0).expand(len(tokens), -1))
        # Both tables are looked up and one is taken: no branch, so places may differ by image.
        is_token = (token >= 0)[..., None]
        return torch.where(is_token, self.token_embedding(ids), self.special_embedding(special))

    def block(self, place: Tensor) -> Tensor:
        """Causal among the first tokens, then one number a level."""
        # floor(log2), exact.
        exponent = torch.bucketize(place, 2 ** torch.arange(40), right=True) - 1
        return torch.where(place < self.first, place, self.first + exponent)

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """As many inputs as outputs; the class is the input of the first token."""
        return entities.ends

    def context_rows(self, entities: Entities) -> tuple[Tensor, Tensor]:
        index = (self.token_of >= 0).nonzero().flatten()
        return index + 1 - entities.length, self.token_of[index]


# Published variants, of the sizes in models/parts/llama.py; parameters at 128 tokens of 8,192 codes, 1,000 classes
def har_b(layout: Layout, num_classes: int = 1000) -> HAR:
    """98,403,072 parameters."""
    return HAR(layout, num_classes=num_classes, **SIZE_B)


def har_l(layout: Layout, num_classes: int = 1000) -> HAR:
    """326,263,808 parameters."""
    return HAR(layout, num_classes=num_classes, **SIZE_L)


def har_xl(layout: Layout, num_classes: int = 1000) -> HAR:
    """753,890,560 parameters."""
    return HAR(layout, num_classes=num_classes, **SIZE_XL)


def har_xxl(layout: Layout, num_classes: int = 1000) -> HAR:
    """1,386,001,920 parameters."""
    return HAR(layout, num_classes=num_classes, **SIZE_XXL)
