"""Llama generators: a stack of Llama blocks behind a prefix, a class or a caption's features
(LlamaGen's backbone, arXiv 2406.06525).
"""

import math
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache, Slots
from tessellar.layers.llama import AttentionKind, LlamaBlock, Pass, Positions, swiglu_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.joint_text import JointText
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import ClassConditioning, Condition, Conditioner, Conditioning
from tessellar.protocol.distribution import Logits, ProjectedLogits
from tessellar.protocol.generator import Prefix, State
from tessellar.text.conditioners import FeatureConditioner

MANY_CODES = 32_768  # from here on a loss may be computed in parts


class Size(TypedDict):
    """What is published of a variant; as keyword arguments of a generator."""

    width: int
    depth: int
    num_heads: int


# LlamaGen's variants (arXiv 2406.06525, table 1), whose sizes Hita, HAR and ReToK have too.
SIZE_B: Size = {"width": 768, "depth": 12, "num_heads": 12}
SIZE_L: Size = {"width": 1024, "depth": 24, "num_heads": 16}
SIZE_XL: Size = {"width": 1280, "depth": 36, "num_heads": 20}
SIZE_XXL: Size = {"width": 1536, "depth": 48, "num_heads": 24}
SIZE_3B: Size = {"width": 3200, "depth": 24, "num_heads": 32}


class ClassPrefix(ClassConditioning, nn.Module):
    """One position: an embedding of the label; the last row stands for no class."""

    length = 1

    def __init__(self, num_classes: int, width: int, dropout: float = 0.0) -> None:
        super().__init__(num_classes, dropout=dropout)
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids)[:, None])


class CaptionPrefix(Conditioning, nn.Module):
    """`length` positions: projected caption features, padded on the left; the null caption is a
    fixed random buffer.
    """

    def __init__(self, feature_dim: int, length: int, width: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
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
            raise ValueError(
                f"captions have {condition.features.shape[1]} positions; this model reads {self.length}"
            )
        return Prefix(self.project(condition.features), condition.valid.bool().cpu())

    def conditioner(self) -> Conditioner:
        return FeatureConditioner()

    def null(self, condition: Condition) -> Condition:
        """The null caption, with the same padding as the caption that it replaces."""
        assert condition.features is not None
        return condition._replace(
            features=self.uncond.to(condition.features.dtype).expand_as(condition.features)
        )


class LlamaGenerator(PrefixTransformer):
    """One sequence, one prefix, one vocabulary: a subclass sets `conditioning`
    (a prefix) and `output`.

    It gives the rotation of each place to `set_rotations`, then calls `init_weights`, and says what
    `embed` reads. What differs (two vocabularies, biases, queries) is overridden. The hidden width
    of the SwiGLU is `ffn_hidden`, or LlamaGen's rule; `num_kv_heads` groups queries.
    """

    #: What the layers are; a subclass may modulate them.
    block_class: ClassVar[type[LlamaBlock]] = LlamaBlock
    conditioning: ClassPrefix | CaptionPrefix | JointText | ClassConditioning
    output: nn.Linear | None
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: str = "auto",
        ffn_hidden: int | None = None,
        num_kv_heads: int | None = None,
        attention_kind: AttentionKind = AttentionKind(),  # noqa: B008
    ) -> None:
        super().__init__()
        if width % num_heads or num_heads % (num_kv_heads or num_heads):
            raise UserError(
                f"width {width}, {num_heads} heads and {num_kv_heads} key heads must divide one another"
            )
        if attention == "flex" and attention_kind.dropout:
            raise UserError("FlexAttention has no dropout of attention weights: leave it at 0")
        self.attention = attention
        self.output = None
        self.width = width
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        hidden = ffn_hidden or swiglu_hidden(width, ffn_multiple_of)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        residual_dropout = 0.0 if drop_path > 0 else dropout
        self.layers = nn.ModuleList(
            self.block_class(
                width,
                num_heads,
                hidden=hidden,
                norm_eps=norm_eps,
                dropout=residual_dropout,
                drop_path=rate,
                implementation=attention,
                num_kv_heads=num_kv_heads,
                attention_kind=attention_kind,
            )
            for rate in rates
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.embedding_dropout = nn.Dropout(dropout)

    def set_rotations(self, cos: Tensor, sin: Tensor) -> None:
        """cos, sin [places, head_dim / 2] of the sequence, prefix first; no part of a checkpoint."""
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """Initialisation.

        | weight                       | distribution                                                    |
        |------------------------------|-----------------------------------------------------------------|
        | every Linear and Embedding   | N(0, 0.02)                                                      |
        | output                       | 0, so the first loss is exactly ln V                            |
        | wo, w2                       | 0 with `zero_init_residual` (not in the paper; helps short runs) |
        | norms                        | 1                                                               |
        | biases                       | 0                                                               |
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.output is not None:
            nn.init.zeros_(self.output.weight)
        if zero_init_residual:
            for layer in self.layers:
                nn.init.zeros_(layer.attention.wo.weight)  # type: ignore[union-attr, arg-type]
                nn.init.zeros_(layer.feed_forward.w2.weight)  # type: ignore[union-attr, arg-type]

    def prefix(self, condition: Condition) -> Prefix:
        assert isinstance(self.conditioning, nn.Module), (
            "a class of no module has a prefix of its own"
        )
        return self.conditioning(condition)

    def positions(self, place: Tensor, state: State) -> Positions:
        """Rotations (and biases) at places [R or 1, n]; places past the end are clamped here."""
        # Windows of speculative decoding look past the end; what is predicted there is thrown away.
        place = place.clamp(max=len(self.rope_cos) - 1).to(self.rope_cos.device)
        return Positions(self.rope_cos[place], self.rope_sin[place])

    def head(
        self, state: State, hidden: Tensor, first: Tensor, want: int
    ) -> Logits | ProjectedLogits:
        # Below that number of codes the parts cost more time than their memory is worth.
        if self.chunked_loss and self.training and isinstance(state.cache, NoCache):
            assert self.output is not None
            if self.output.out_features >= MANY_CODES:
                return ProjectedLogits(hidden, self.output.weight)
        return self.head_at(state, hidden, state.entities.steps(first, want))

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        assert self.output is not None
        logits = at_least_float32(self.output(hidden))
        return Logits(state.merge(logits, state.entities.entity_at(rank)))

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None
        return Pass(self.positions(place, state), state.cache, slots)
