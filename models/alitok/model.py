"""AliTok's generator: a plain next-token Llama over its tokens (arXiv 2506.05289).

One table embeds codes and classes; queries and keys are normed per head before they are rotated:

    place      class      prefix 0 .. P - 1          patch (r, c)
    rotation   zero row   one angle a place: j       half the pairs P + r, the other half P + c

The zero row makes the class token's query and key zero: every place attends to it with a score of
0, its value counts. Different from the official code: any categorical layout of one vocabulary.
Each of its segments begins where the one before ends, a sequence turns by the place in it, a grid
by row and column.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.llama import AttentionKind, frequencies, grid_angles
from tessellar.layers.tags import tag
from tessellar.models.parts.llama import LlamaGenerator
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Prefix, require_categorical
from tessellar.protocol.layout import Layout


class AliTokAR(LlamaGenerator):
    """Class-conditional generator of one categorical vocabulary.

    `dropout` acts on embeddings, attention weights and the outputs of both branches. Raises
    UserError for a layout that is not categorical or has several vocabularies, and for heads whose
    channels are no multiple of 4.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            attention=attention,
            attention_kind=AttentionKind(bias=True, dropout=dropout, qk_norm=True),
        )
        if self.head_dim % 4:
            raise UserError(
                f"heads of {self.head_dim} channels cannot turn by row and column: give a width of "
                f"{num_heads} heads times a multiple of 4, not {width}"
            )
        self.layout = layout
        self.entities = token_order(layout)
        self.num_classes = num_classes
        self.vocab = require_categorical(layout, "AliTok's generator")
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        # rows: codes, one that is never used, classes, no class
        self.embedding = nn.Embedding(self.vocab + 1 + num_classes + 1, width)
        self.output = nn.Linear(width, self.vocab)
        angles = segment_angles(layout, self.head_dim, rope_base)
        class_row = (0, 0, 1, 0)
        self.set_rotations(F.pad(angles.cos(), class_row), F.pad(angles.sin(), class_row))
        self.init_weights(zero_init_residual)
        tag(self.embedding.weight, "no_decay")

    def code_embeddings(self) -> Tensor:
        return self.embedding.weight[: self.vocab]

    def prefix(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids + self.vocab + 1)[:, None])

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th token (its successor is predicted there)."""
        index = index.clamp(max=entities.length - 1).to(tokens.device)
        return self.embedding(tokens.gather(1, index.expand(len(tokens), -1)))


def segment_angles(layout: Layout, head_dim: int, base: float) -> Tensor:
    """Angles [N, head_dim / 2] of the tokens; each segment's places count on from the one before."""
    start = 0
    angles = []
    for segment in layout.segments:
        place = torch.arange(segment.length)
        if len(segment.shape) == 2:
            rows = start + place // segment.shape[1]
            columns = start + place % segment.shape[1]
            angles.append(grid_angles(rows, columns, head_dim, base))
        else:
            angles.append((start + place)[:, None] * frequencies(head_dim // 2, base))
        start += max(segment.shape)
    return torch.cat(angles)


# Published variants: width, depth, heads.      parameters on 17 + 16 x 16 tokens of 4,096 codes, 1,000 classes
def alitok_b(layout: Layout, num_classes: int = 1000) -> AliTokAR:
    """177,048,064 parameters."""
    return AliTokAR(layout, 768, depth=24, num_heads=16, num_classes=num_classes)


def alitok_l(layout: Layout, num_classes: int = 1000) -> AliTokAR:
    """317,851,648 parameters."""
    return AliTokAR(layout, 1024, depth=24, num_heads=16, num_classes=num_classes)


def alitok_xl(layout: Layout, num_classes: int = 1000) -> AliTokAR:
    """662,141,696 parameters."""
    return AliTokAR(layout, 1280, depth=32, num_heads=16, num_classes=num_classes)
