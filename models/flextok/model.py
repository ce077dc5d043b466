"""FlexAR: next-token generator over FlexTok's tokens, class- or text-conditional (arXiv
2502.13967).

A start vector, with the class added to it, precedes the tokens; text is read by cross-attention in
every block. The order of FlexTok's tokens is coarse to fine, so a prefix of what is generated can
be decoded. Different from the official code: keys are cached, and the null class stays null at
every step (`null_class` reproduces the official slip). The block is a plausible reading (`plain
GELU MLP, LayerNorm, QK-norm`): the released configs were not available.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.precision import at_least_float32
from tessellar.layers.split_attention import SplitAttention
from tessellar.layers.tags import tag
from tessellar.models.parts.cached_attention import CachedAttention
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import ClassConditioning, Condition, Conditioner, Conditioning
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Prefix, State, require_categorical
from tessellar.protocol.layout import Layout
from tessellar.text.conditioners import FeatureConditioner

EPS = 1e-6


class FlexARPass(NamedTuple):
    """What all blocks of one pass share: the cache, and projected text [R, P, D] with who sees it
    [R, 1, 1, P].
    """

    cache: KVCache | NoCache | PlacedCache
    slots: Slots
    text: Tensor | None = None
    visible: Tensor | None = None


class FlexARBlock(nn.Module):
    """x += Attention(norm x); with text x += CrossAttention(norm x, text); x += MLP(norm x),
    exact GELU.
    """

    def __init__(
        self, width: int, num_heads: int, qk_norm: bool, text: bool, implementation: str
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = CachedAttention(
            width,
            num_heads,
            bias=False,
            qk_norm_eps=EPS if qk_norm else None,
            implementation=implementation,
        )
        self.cross_norm = nn.LayerNorm(width, eps=EPS) if text else None
        self.cross = SplitAttention(width, num_heads) if text else None
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: FlexARPass) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layer, shared)
        if self.cross is not None and self.cross_norm is not None:
            assert shared.text is not None and shared.visible is not None
            x = x + self.cross(self.cross_norm(x), shared.text, shared.visible)
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class TextConditioning(Conditioning, nn.Module):
    """Features of a text [B, P, F]; none is the empty prompt of `length` features, which has to be
    filled in.
    """

    def __init__(self, length: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.register_buffer("empty", torch.zeros(length, dim))
        self.register_buffer("empty_valid", torch.zeros(length, dtype=torch.bool))
        self.empty: Tensor
        self.empty_valid: Tensor

    def conditioner(self) -> Conditioner:
        return FeatureConditioner()

    def null(self, condition: Condition) -> Condition:
        """Raises UserError while the empty prompt is not known."""
        if not bool(self.empty_valid.any()):
            raise UserError(
                "the features of the empty prompt are not known: give them to set_empty_prompt"
            )
        rows = condition.batch
        return Condition(
            valid=self.empty_valid.expand(rows, -1), features=self.empty.expand(rows, -1, -1)
        )


class FlexAR(PrefixTransformer):
    """Next-token generator over one categorical vocabulary.

    Give `num_classes`, or `text_dim` (and `text_hidden` of the text's MLP; None: the same) for text
    features. The null condition is no class (`null_class`: that class), or the empty prompt, which
    `set_empty_prompt` fills in. Raises UserError for a layout that is not categorical or has
    several vocabularies.
    """

    predicts_places = True

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int | None = 1000,
        text_dim: int | None = None,
        text_hidden: int | None = None,
        text_length: int = 1,
        qk_norm: bool = True,
        learned_positions: bool = False,
        condition_dropout: float = 0.1,
        null_class: int | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if (num_classes is None) == (text_dim is None):
            raise ValueError("FlexAR needs either num_classes or text_dim")
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}")
        self.layout = layout
        self.entities = token_order(layout)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.num_classes = num_classes
        vocab = require_categorical(layout, "FlexAR")
        self.token_embedding = nn.Embedding(vocab, width)
        self.start_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(
            positions_1d(layout.length, width), requires_grad=learned_positions
        )
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)
        self.text: nn.Sequential | None = None
        if text_dim is not None:
            hidden = text_hidden or text_dim
            fc1 = nn.Linear(text_dim, hidden, bias=False)
            fc2 = nn.Linear(hidden, width, bias=False)
            self.text = nn.Sequential(fc1, nn.GELU(approximate="tanh"), fc2)
            self.conditioning = TextConditioning(text_length, text_dim, dropout=condition_dropout)
        elif num_classes is not None:
            self.conditioning = ClassConditioning(
                num_classes, null_class, dropout=condition_dropout
            )
        self.embedding_dropout = nn.Identity()
        blocks = (
            FlexARBlock(width, num_heads, qk_norm, text_dim is not None, attention)
            for _ in range(depth)
        )
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.output = nn.Linear(width, vocab, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers, embeddings and the start vector N(0, 0.02); the output zero, so the first
        loss is ln V.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.start_token, std=0.02)
        nn.init.zeros_(self.output.weight)
        tag(self.positions, "no_decay")

    def set_empty_prompt(self, features: Tensor, valid: Tensor) -> None:
        """Features [P, F] of the empty prompt and which of them are real [P]; P is `text_length`."""
        assert isinstance(self.conditioning, TextConditioning)
        self.conditioning.empty.copy_(features)
        self.conditioning.empty_valid.copy_(valid)

    def prefix(self, condition: Condition) -> Prefix:
        first = (self.start_token + self.positions[0]).expand(condition.batch, 1, -1)
        if self.classes is None or self.num_classes is None:
            return Prefix(first)
        assert condition.ids is not None
        known = condition.ids < self.num_classes
        embedded = self.classes(condition.ids.clamp(max=self.num_classes - 1))
        return Prefix(first + torch.where(known[:, None], embedded, 0.0)[:, None])

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Token i at the place behind it; the last one's successor is never read."""
        last = entities.length - 1
        place = (index.clamp(max=last - 1) + 1).to(tokens.device)
        ids = tokens.gather(1, index.clamp(max=last).to(tokens.device).expand(len(tokens), -1))
        return self.token_embedding(ids) + self.positions[place]

    def project_text(self, features: Tensor) -> Tensor:
        """Features [..., F] of the text encoder to [..., D]."""
        assert self.text is not None
        return self.text(features)

    def shared(self, place: Tensor, state: State, slots: Slots) -> FlexARPass:
        assert state.cache is not None
        if self.text is None:
            return FlexARPass(state.cache, slots)
        condition = state.condition
        assert condition.features is not None and condition.valid is not None
        visible = condition.valid.bool().to(condition.features.device)[:, None, None]
        return FlexARPass(state.cache, slots, self.project_text(condition.features), visible)

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        return self.head_at(state, hidden, state.entities.steps(first, want))

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        logits = at_least_float32(self.output(hidden))
        return Logits(state.merge(logits, state.entities.entity_at(rank)))


def positions_1d(length: int, width: int) -> Tensor:
    """The official sin-cos table [N, D]: a 2D formula on a column, so half of it is constant; the
    start has none.
    """
    quarter = width // 4
    places = torch.arange(length - 1, dtype=torch.float64)
    angles = places[:, None] * 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    constant = torch.cat([torch.zeros_like(angles), torch.ones_like(angles)], dim=1)
    return F.pad(torch.cat([constant, angles.sin(), angles.cos()], dim=1).float(), (0, 0, 1, 0))


# Published variants: width, depth; the matrices of their blocks (16 width^2 a block with
# cross-attention) have
def flexar_113m_t2i(layout: Layout, text_dim: int = 2048) -> FlexAR:
    """113,246,208 parameters in the matrices of the blocks."""
    return FlexAR(layout, 768, 12, 12, None, text_dim)


def flexar_382m_t2i(layout: Layout, text_dim: int = 2048) -> FlexAR:
    """382,205,952 parameters in the matrices of the blocks."""
    return FlexAR(layout, 1152, 18, 18, None, text_dim)


def flexar_1b_t2i(layout: Layout, text_dim: int = 2048) -> FlexAR:
    """1,151,860,736 parameters in the matrices of the blocks."""
    return FlexAR(layout, 1664, 26, 26, None, text_dim)


def flexar_3b_t2i(layout: Layout, text_dim: int = 2048) -> FlexAR:
    """3,057,647,616 parameters in the matrices of the blocks."""
    return FlexAR(layout, 2304, 36, 36, None, text_dim)
