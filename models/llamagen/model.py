"""LlamaGen: a plain Llama over the tokens of a grid, behind a class or caption prefix (arXiv
2406.06525).

The baseline generator of the field. As in the official code, the rotation of prefix positions is
zero (cos = sin = 0, not the identity): prefix queries and keys become zero vectors, so every image
token sees each of them with score 0. Different from the official code: the cache is an argument,
not module state, and any categorical layout is accepted (a sequence turns by its index along the
row axis alone).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.llama import grid_angles
from tessellar.models.parts.llama import (
    SIZE_3B,
    SIZE_B,
    SIZE_L,
    SIZE_XL,
    SIZE_XXL,
    CaptionPrefix,
    ClassPrefix,
    LlamaGenerator,
)
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import require_categorical
from tessellar.protocol.layout import Layout


class LlamaGen(LlamaGenerator):
    """Next-token generator over a categorical layout.

    Give `num_classes` for a class prefix, or `caption_dim` (and `caption_length`) for caption
    features. Raises UserError for a layout that is not categorical or has several vocabularies.
    """

    output: nn.Linear
    predicts_places = True
    chunked_loss = False

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        caption_length: int = 120,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            drop_path=drop_path,
            attention=attention,
        )
        if (num_classes is None) == (caption_dim is None):
            raise ValueError("LlamaGen needs either num_classes or caption_dim")
        self.layout = layout
        self.entities = token_order(layout)
        vocab = require_categorical(layout, "LlamaGen")
        self.token_embedding = nn.Embedding(vocab, width)
        if num_classes is not None:
            self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        else:
            assert caption_dim is not None
            self.conditioning = CaptionPrefix(
                caption_dim, caption_length, width=width, dropout=condition_dropout
            )
        self.output = nn.Linear(width, vocab, bias=False)
        self.rope_base = rope_base
        self.set_rotations(*self.rotations(layout))
        self.init_weights(zero_init_residual)
        self._layouts: dict[Layout, tuple[Entities, Tensor, Tensor]] = {}

    def rotations(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """cos, sin [P + N, head_dim / 2] of the prefix and of a layout's places."""
        return rope_table(layout, self.prefix_length, self.head_dim, self.rope_base)

    def take_layout(self, layout: Layout) -> None:
        """Rotations follow rows and columns, so other grids need no other weights."""
        if not layout.differs_in_shapes(self.layout):
            super().take_layout(layout)
        if layout not in self._layouts:
            self._layouts[layout] = (token_order(layout), *self.rotations(layout))
        self.layout = layout
        self.entities, cos, sin = self._layouts[layout]
        device = self.rope_cos.device
        self.set_rotations(cos.to(device), sin.to(device))

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th token generated (its successor is predicted there)."""
        index = entities.order.expand(len(index), -1).gather(
            1, index.clamp(max=entities.length - 1)
        )
        ids = tokens[:, index[0]] if len(index) == 1 else tokens.gather(1, index.to(tokens.device))
        return self.token_embedding(ids)


def rope_table(
    layout: Layout, prefix_length: int, head_dim: int, base: float
) -> tuple[Tensor, Tensor]:
    """cos, sin [P + N, head_dim / 2]; all zero on the prefix."""
    # Row and column of each token: of a grid its own, of a sequence (index, 0).
    rows = []
    columns = []
    for segment in layout.segments:
        place = torch.arange(segment.length)
        side = segment.shape[-1] if len(segment.shape) == 2 else segment.length
        rows.append(place % side if len(segment.shape) == 1 else place // side)
        columns.append(torch.zeros_like(place) if len(segment.shape) == 1 else place % side)
    angles = grid_angles(torch.cat(rows), torch.cat(columns), head_dim, base)
    # A zero rotation, not the identity: what stands in the prefix gets scores of 0.
    cos = angles.cos()
    sin = angles.sin()
    return F.pad(cos, (0, 0, prefix_length, 0)), F.pad(sin, (0, 0, prefix_length, 0))


# Published variants, of the sizes in models/parts/llama.py; parameters (class-conditional, 16,384 codes, 1,000 classes)
def llamagen_b(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """110,888,448 parameters."""
    return LlamaGen(layout, num_classes=num_classes, **SIZE_B)


def llamagen_l(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """342,910,976 parameters."""
    return LlamaGen(layout, num_classes=num_classes, **SIZE_L)


def llamagen_xl(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """774,699,520 parameters."""
    return LlamaGen(layout, num_classes=num_classes, **SIZE_XL)


def llamagen_xxl(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """1,410,972,672 parameters."""
    return LlamaGen(layout, num_classes=num_classes, **SIZE_XXL)


def llamagen_3b(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """3,096,659,200 parameters."""
    return LlamaGen(layout, num_classes=num_classes, **SIZE_3B)


def llamagen_t2i_xl(layout: Layout, caption_dim: int = 2048, caption_length: int = 120) -> LlamaGen:
    """777,678,080 parameters; reads FLAN-T5-XL features."""
    return LlamaGen(
        layout,
        num_classes=None,
        caption_dim=caption_dim,
        caption_length=caption_length,
        **SIZE_XL,
    )
