"""ARPG: random orders with parallel decoding; what is known is read by one stage, what is asked by
another (arXiv 2503.10568).

    stage 1   class, tokens in their order       causal self-attention, turned by their own places;
                                                 one shared key and value a position come out
    stage 2   one mask embedding a target        cross-attention to them, turned by the target's
                                                 place; targets do not see each other

Only what is known is cached, so any number of targets can be asked for at once, and their number
does not change what one of them is told. The class does not turn: its rotation is 0, as LlamaGen's.
Training asks for every token of a uniform order of each sample's own.

Different from the official code: stage 1 is causal when images are drawn, too, as it is in training
(there, tokens of one set see each other); every image draws its own order from its own noise. The
spare row of the embedding table is left out.
"""

from math import acos, cos, pi
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention as attend
from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.layers.llama import LlamaBlock, Pass, Positions, SwiGLU, rotate, swiglu_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.position_queries import first_of_entity, spots_of
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.models.parts.random_sets import growing_sizes
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Prefix, State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_name
from tessellar.protocol.work import Work, causal_attention_macs, linear_macs

Curve = Literal["arccos", "cosine"]


def arpg_sizes(length: int, steps: int, curve: Curve = "arccos") -> tuple[int, ...]:
    """Tokens of each step: behind step s of S, N r are left, r = arccos((s + 1) / S) / (pi / 2), or
    cos(pi / 2 (s + 1) / S).
    """

    def known(step: int) -> int:
        done = (step + 1) / steps
        left = acos(done) / (pi / 2) if curve == "arccos" else cos(pi / 2 * done)
        return length - int(length * left)

    return growing_sizes(steps, length, known)


class CrossPass(NamedTuple):
    """What all blocks of stage 2 share: rotations of the targets, keys and values [R, H, S, d] of
    what is known, and which of them each target sees [R or 1, 1, n, S].
    """

    positions: Positions
    keys: Tensor
    values: Tensor
    mask: Tensor


class CrossBlock(nn.Module):
    """x += CrossAttention(norm x), x += SwiGLU(norm x); keys and values are those of all blocks."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, norm_eps: float, dropout: float, kind: str
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = kind
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.wq = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.feed_forward = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: CrossPass) -> Tensor:
        q = rearrange(self.wq(self.attention_norm(x)), "b n (h d) -> b h n d", h=self.num_heads)
        q = rotate(q, shared.positions.cos, shared.positions.sin).to(shared.keys.dtype)
        out = attend(
            q,
            shared.keys,
            shared.values,
            mask=shared.mask,
            is_causal=False,
            implementation=self.implementation,
        )
        x = x + self.dropout(self.wo(rearrange(out, "b h n d -> b n (h d)")))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class ARPG(PrefixTransformer):
    """Class-conditional generator of one categorical vocabulary in any order.

    `depth` blocks, half of them in each stage. Images are drawn in `steps` sets of a random order
    each (None: token by token), whose sizes grow by `curve`; whatever asks for no plan goes token
    by token in the layout's own order. Raises UserError for a layout that is not categorical or has
    several vocabularies, for an odd depth, and for more steps than tokens.
    """

    further_caches: ClassVar[int] = 1  # the keys and values of stage 2

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        steps: int | None = 64,
        curve: Curve = "arccos",
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if depth % 2 or width % num_heads:
            raise UserError(
                f"depth {depth} must be even, and num_heads {num_heads} must divide width {width}"
            )
        check_name("curve of ARPG", curve, get_args(Curve))
        self.layout = layout
        self.entities = token_order(layout)
        self.by_token = self.entities
        self.curve: Curve = curve
        self.steps = layout.length if steps is None else steps
        arpg_sizes(layout.length, self.steps, curve)  # or it says what is wrong
        self.vocab = require_categorical(layout, "ARPG")
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.width = width
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        # rows: tokens, the mask that asks, classes, no class
        self.embedding = nn.Embedding(self.vocab + 1 + num_classes + 1, width)
        self.embedding_dropout = nn.Dropout(dropout)
        hidden = swiglu_hidden(width, ffn_multiple_of)
        self.layers = nn.ModuleList(
            LlamaBlock(
                width,
                num_heads,
                hidden=hidden,
                norm_eps=norm_eps,
                dropout=dropout,
                implementation=attention,
            )
            for _ in range(depth // 2)
        )
        self.known_norm = nn.RMSNorm(width, eps=norm_eps)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.cross_layers = nn.ModuleList(
            CrossBlock(
                width,
                num_heads,
                hidden=hidden,
                norm_eps=norm_eps,
                dropout=dropout,
                kind=attention,
            )
            for _ in range(depth // 2)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.output = nn.Linear(width, self.vocab, bias=False)
        for linear in (self.wk, self.wv):
            tag(linear.weight, "hidden")
        # Row 0: the class, whose rotation is zero.
        cos_table, sin_table = rope_table(layout, 1, self.head_dim, rope_base)
        self.register_buffer("rope_cos", cos_table, persistent=False)
        self.register_buffer("rope_sin", sin_table, persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) everywhere; the output at zero, so that the first loss is exactly ln V."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """A uniform order of each image's own, in `steps` sets."""
        count = self.steps if steps is None else steps
        sizes = arpg_sizes(self.layout.length, count, self.curve)
        return Entities(noise.uniform(self.layout.length).argsort(-1).cpu(), sizes)

    def free_order(self) -> Entities:
        return self.by_token

    def training_order(self, batch: int) -> Entities:
        order = torch.rand(batch, self.layout.length, device="cpu").argsort(1)
        return Entities(order, self.by_token.sizes)

    def code_embeddings(self) -> Tensor:
        return self.embedding.weight[: self.vocab]

    def prefix(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids + self.vocab + 1)[:, None])

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        spot = spots_of(index, entities.order).to(tokens.device)
        return self.embedding(tokens.gather(1, spot.expand(len(tokens), -1)))

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """The input of an entity is the tokens of the one before; of the first, the class."""
        return F.pad(entities.ends[:-1] + prefix_length, (1, 0), value=prefix_length - 1)

    def positions(self, index: Tensor, state: State) -> Positions:
        """Rotations of tokens or targets by generation rank [R or 1, n]; below 0: the class."""
        order = state.entities.order
        order = order if order.ndim == 1 else state.rows(order)
        spot = spots_of(index.clamp(min=0), order)
        row = torch.where(index < 0, 0, 1 + spot).to(self.rope_cos.device)
        return Positions(self.rope_cos[row], self.rope_sin[row])

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None and state.prefix is not None
        return Pass(self.positions(place - state.prefix.length, state), state.cache, slots)

    def read_known(self, state: State, place: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 1: keys and values [R, H, S, d] of all that is known, with the inputs at `place`."""
        assert isinstance(state.cache, (KVCache, NoCache))
        x = self.embedding_dropout(self._inputs(state, place, tokens))
        slots = state.cache.reserve(self.visibility(state, place))
        shared = self.shared(place, state, slots)
        known = self.known_norm(self.through_layers(x, shared))
        k = rearrange(self.wk(known), "b n (h d) -> b h n d", h=self.num_heads)
        v = rearrange(self.wv(known), "b n (h d) -> b h n d", h=self.num_heads)
        k = rotate(k, shared.positions.cos, shared.positions.sin)
        k, v = state.cache.write(len(self.layers), slots, k, v)
        state.cache.commit()
        return k, v

    def ask(self, state: State, rank: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stage 2: hidden states [R, n, D] of the tokens of generation ranks [R or 1, n]."""
        assert state.prefix is not None
        # Slot s holds sequence place s: the class, then tokens by rank. A target sees those before its set.
        seen = state.prefix.length + first_of_entity(rank, state.entities)
        slot = torch.arange(keys.shape[2], device=keys.device)
        mask = slot < seen.to(keys.device)[..., None]
        shared = CrossPass(self.positions(rank, state), keys, values, mask[:, None])
        query = self.embedding.weight[self.vocab]
        x = query.expand(len(keys), rank.shape[1], -1)
        return self.through_layers(x, shared, self.cross_layers)

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        want = count if want is None else want
        first = state.fed + (count - want)
        keys, values = self.read_known(state, state.places(count), tokens)
        state.advance(count)
        rank = state.entities.steps(first, want)
        are_in_step = bool((rank == rank[:1]).all())
        asked = rank[:1] if are_in_step else state.rows(rank)
        hidden = self.ask(state, asked, keys, values)
        return self._distribution(state, hidden, rank.shape[1], first, want)

    def score(
        self, tokens: Tensor, condition: Condition, entities: Entities | None = None
    ) -> Distribution:
        """Teacher-forced distribution of all entities: one pass of each stage."""
        state = self._state(condition, NO_GUIDANCE, entities or self.entities)
        state.cache = NoCache(tokens.device)
        assert state.input_ends is not None
        length = state.entities.length
        context = torch.arange(int(state.input_ends[-1]))[None]
        keys, values = self.read_known(state, context, self.read(tokens, state.entities))
        hidden = self.ask(state, torch.arange(length)[None], keys, values)
        return self._distribution(state, hidden, length, state.fed, state.entities.count)

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        """Guidance goes by the share of tokens that are known before the set: w(k / N)."""
        logits = at_least_float32(self.output(hidden))
        known = first_of_entity(state.entities.steps(first, want), state.entities)
        return Logits(state.guidance.merge(logits, known, self.by_token))

    def context_rows(self, entities: Entities) -> tuple[Tensor, Tensor]:
        raise UserError("ARPG reads its tokens in a stage of its own: its targets read none")

    def work(self) -> Work:
        """Stage 1 at every position, stage 2 at every target."""
        length = self.layout.length
        depth = len(self.layers) + len(self.cross_layers)
        attention = causal_attention_macs(depth, self.width, length)
        blocks = linear_macs(self.layers) + linear_macs(self.cross_layers)
        around = linear_macs(self) - blocks
        return Work(2 * length, blocks * length + attention, around * length)


# Published variants: LlamaGen's widths.                     parameters at 16,384 codes, 1,000 classes
def arpg_l(layout: Layout, num_classes: int = 1000, steps: int | None = 64) -> ARPG:
    """319,844,352 parameters."""
    return ARPG(layout, 1024, 24, num_heads=16, num_classes=num_classes, steps=steps)


def arpg_xl(layout: Layout, num_classes: int = 1000, steps: int | None = 64) -> ARPG:
    """718,996,480 parameters."""
    return ARPG(layout, 1280, 36, num_heads=20, num_classes=num_classes, steps=steps)


def arpg_xxl(layout: Layout, num_classes: int = 1000, steps: int | None = 64) -> ARPG:
    """1,302,448,128 parameters."""
    return ARPG(layout, 1536, 48, num_heads=24, num_classes=num_classes, steps=steps)
