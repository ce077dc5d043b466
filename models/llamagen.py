"""LlamaGen: a plain Llama over the tokens of a grid, behind a class or caption prefix (arXiv 2406.06525).

The baseline generator of the field. As in the official code, the rotation of prefix positions is zero (cos = sin = 0,
not the identity): prefix queries and keys become zero vectors, so every image token sees each of them with score 0.
Different from the official code: the cache is an argument, not module state, and any categorical layout is accepted (a
sequence turns by its index along the row axis alone).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.llama import Positions
from tessellar.layers.rope import grid_angles
from tessellar.models.condition import Condition
from tessellar.models.conditioners import ClassConditioner, Conditioner, FeatureConditioner
from tessellar.models.entities import Entities, token_order
from tessellar.models.generator import Prefix, State, require_categorical
from tessellar.models.heads.logits import Logits
from tessellar.models.llama import LlamaGenerator
from tessellar.tokenizers.layout import Layout


class ClassPrefix(nn.Module):
    """One position: an embedding of the label; the last row stands for no class."""

    length = 1

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids)[:, None])

    def null(self, condition: Condition) -> Condition:
        assert condition.ids is not None
        return Condition(ids=torch.full_like(condition.ids, self.num_classes))


class CaptionPrefix(nn.Module):
    """`length` positions: projected caption features, padded on the left; the null caption is a fixed random buffer."""

    def __init__(self, feature_dim: int, length: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.fc1 = nn.Linear(feature_dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("uncond", torch.randn(length, feature_dim) / math.sqrt(feature_dim))
        self.uncond: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Features [..., F] to embeddings [..., D]."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def forward(self, condition: Condition) -> Prefix:
        assert condition.features is not None and condition.valid is not None
        if condition.features.shape[1] != self.length:
            raise ValueError(f"captions have {condition.features.shape[1]} positions; this model reads {self.length}")
        return Prefix(self.project(condition.features), condition.valid.bool().cpu())

    def null(self, condition: Condition) -> Condition:
        """The null caption, with the same padding as the caption that it replaces."""
        assert condition.features is not None
        return condition._replace(features=self.uncond.to(condition.features.dtype).expand_as(condition.features))


class LlamaGen(LlamaGenerator):
    """Next-token generator over a categorical layout.

    Give `num_classes` for a class prefix, or `caption_dim` (and `caption_length`) for caption features. Raises
    UserError for a layout that is not categorical or has several vocabularies.
    """

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
        super().__init__(width, depth, num_heads, ffn_multiple_of, norm_eps, dropout, drop_path, attention)
        if (num_classes is None) == (caption_dim is None):
            raise ValueError("LlamaGen needs either num_classes or caption_dim")
        self.layout, self.entities, self.condition_dropout = layout, token_order(layout), condition_dropout
        vocab = require_categorical(layout, "LlamaGen")
        self.token_embedding = nn.Embedding(vocab, width)
        if num_classes is not None:
            self.conditioning: ClassPrefix | CaptionPrefix = ClassPrefix(num_classes, width)
        else:
            assert caption_dim is not None
            self.conditioning = CaptionPrefix(caption_dim, caption_length, width)
        self.output = nn.Linear(width, vocab, bias=False)
        cos, sin = rope_table(layout, self.conditioning.length, self.head_dim, rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool) -> None:
        """Initialisation.

        | weight                       | distribution                                                    |
        |------------------------------|-----------------------------------------------------------------|
        | every Linear and Embedding   | N(0, 0.02)                                                      |
        | output                       | 0, so the first loss is exactly ln V                            |
        | wo, w2                       | 0 with `zero_init_residual` (not in the paper; helps short runs) |
        | norms                        | 1                                                               |
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        if zero_init_residual:
            for layer in self.layers:
                nn.init.zeros_(layer.attention.wo.weight)  # type: ignore[union-attr, arg-type]
                nn.init.zeros_(layer.feed_forward.w2.weight)  # type: ignore[union-attr, arg-type]

    def make_conditioner(self) -> Conditioner:
        if isinstance(self.conditioning, ClassPrefix):
            return ClassConditioner(self.conditioning.num_classes)
        return FeatureConditioner()

    def null(self, condition: Condition) -> Condition:
        return self.conditioning.null(condition)

    def prefix(self, condition: Condition) -> Prefix:
        return self.conditioning(condition)

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th token generated (its successor is predicted there)."""
        index = entities.order.expand(len(index), -1).gather(1, index.clamp(max=entities.length - 1))
        ids = tokens[:, index[0]] if len(index) == 1 else tokens.gather(1, index.to(tokens.device))
        return self.token_embedding(ids)

    def positions(self, place: Tensor, state: State) -> Positions:
        place = place.clamp(max=len(self.rope_cos) - 1).to(self.rope_cos.device)
        return Positions(self.rope_cos[place], self.rope_sin[place])

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        logits = self.output(hidden).float()
        return Logits(state.merge(logits, state.entities.entity_of(first, want)))

    def loss(self, tokens: Tensor, condition: Condition, weight: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.score(tokens, self.drop_condition(condition))
        return {"cross_entropy": scores.cross_entropy(tokens, weight)}  # type: ignore[attr-defined]


def rope_table(layout: Layout, prefix_length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos, sin [P + N, head_dim / 2]; all zero on the prefix."""
    rows, columns = [], []
    for segment in layout.segments:
        place = torch.arange(segment.length)
        side = segment.shape[-1] if len(segment.shape) == 2 else segment.length
        rows.append(place % side if len(segment.shape) == 1 else place // side)
        columns.append(torch.zeros_like(place) if len(segment.shape) == 1 else place % side)
    angles = grid_angles(torch.cat(rows), torch.cat(columns), head_dim, base)
    cos, sin = angles.cos(), angles.sin()
    return F.pad(cos, (0, 0, prefix_length, 0)), F.pad(sin, (0, 0, prefix_length, 0))


# Published variants: width, depth, heads.          parameters (class-conditional, 16,384 codes, 1,000 classes)
def llamagen_b(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """110,888,448 parameters."""
    return LlamaGen(layout, 768, 12, 12, num_classes)


def llamagen_l(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """342,910,976 parameters."""
    return LlamaGen(layout, 1024, 24, 16, num_classes)


def llamagen_xl(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """774,699,520 parameters."""
    return LlamaGen(layout, 1280, 36, 20, num_classes)


def llamagen_xxl(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """1,410,972,672 parameters."""
    return LlamaGen(layout, 1536, 48, 24, num_classes)


def llamagen_3b(layout: Layout, num_classes: int = 1000) -> LlamaGen:
    """3,096,659,200 parameters."""
    return LlamaGen(layout, 3200, 24, 32, num_classes)


def llamagen_t2i_xl(layout: Layout, caption_dim: int = 2048, caption_length: int = 120) -> LlamaGen:
    """777,678,080 parameters; reads FLAN-T5-XL features."""
    return LlamaGen(layout, 1280, 36, 20, None, caption_dim, caption_length)
