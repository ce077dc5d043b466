"""RandAR: LlamaGen over tokens in any order, each behind an instruction that says where it goes
(arXiv 2412.01827).

    sequence   class  q_0  x_0  q_1  x_1  ..          q_i: the place of x_i, as an instruction
    read at           x_0       x_1

An instruction is one learned vector, turned by the rotation of its place; it and its token turn by
that place in attention, too. The class does not turn: its rotation is 0, as LlamaGen's. Training
reads each sample in a uniform order of its own under a causal mask. Decoding asks for a growing
number of tokens at once: instructions of one set see those before them, but not their tokens, which
are not drawn yet; the next evaluation reads the set interleaved, as in training.

Different from the official code: every image draws its own order from its own noise; the first
instruction of a set is read again with its token instead of kept, with the same values; caches and
positions are arguments; sequences are taken, too.
"""

from math import cos, floor, pi

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache, Slots
from tessellar.layers.llama import Pass, Positions, rotate
from tessellar.layers.precision import at_least_float32
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.llama import SIZE_L, SIZE_XL, SIZE_XXL, ClassPrefix, LlamaGenerator
from tessellar.models.parts.position_queries import (
    QUERY,
    PositionQueries,
    first_of_entity,
    spots_of,
)
from tessellar.models.parts.random_sets import growing_sizes
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.work import Work, causal_attention_macs, linear_macs


def randar_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Tokens of each step: behind step s there are (1 - cos(pi / 2 (s + 1) / S)) N + 1 of N."""

    def known(step: int) -> int:
        return floor((1 - cos(pi / 2 * (step + 1) / steps)) * length + 1)

    return growing_sizes(steps, length, known)


class RandAR(PositionQueries, LlamaGenerator):
    """Class-conditional generator of one categorical vocabulary in any order.

    Images are drawn in `steps` sets of a random order each (None: token by token); whatever asks
    for no plan goes token by token in the layout's own order. Raises UserError for a layout that is
    not categorical or has several vocabularies, and for more steps than tokens.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        steps: int | None = 88,
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
        self.layout = layout
        self.entities = token_order(layout)
        self.by_token = self.entities
        self.steps = layout.length if steps is None else steps
        randar_sizes(layout.length, self.steps)  # or it says what is wrong
        vocab = require_categorical(layout, "RandAR")
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.token_embedding = nn.Embedding(vocab, width)
        self.query = nn.Parameter(torch.empty(1, width))
        self.output = nn.Linear(width, vocab, bias=False)
        self.set_rotations(*rope_table(layout, 1, self.head_dim, rope_base))
        self.init_weights(zero_init_residual)
        nn.init.normal_(self.query, std=0.02)

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """A uniform order of each image's own, in `steps` sets."""
        sizes = randar_sizes(self.layout.length, self.steps if steps is None else steps)
        return Entities(noise.uniform(self.layout.length).argsort(-1).cpu(), sizes)

    def free_order(self) -> Entities:
        return self.by_token

    def training_order(self, batch: int) -> Entities:
        order = torch.rand(batch, self.layout.length, device="cpu").argsort(1)
        return Entities(order, self.by_token.sizes)

    def ranks_at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Context is interleaved: the instruction of rank r at 2 r, its token at 2 r + 1."""
        is_asked = index >= QUERY
        rank = torch.where(is_asked, index % QUERY, index.div(2, rounding_mode="floor"))
        return rank, is_asked | (index % 2 == 0)

    def asking(self, spot: Tensor) -> Tensor:
        """The learned vector, turned by the rotation of each place."""
        heads = rearrange(self.query[0], "(h d) -> 1 h 1 d", h=self.num_heads)
        heads = heads.expand(len(spot), -1, spot.shape[1], -1)
        turned = rotate(heads, self.rope_cos[1 + spot], self.rope_sin[1 + spot])
        return rearrange(turned, "r h n d -> r n (h d)")

    def placed(self, x: Tensor, spot: Tensor) -> Tensor:
        """As it is: places are told by rotations alone."""
        return x

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """The input of an entity is the one before, instructions and tokens interleaved."""
        ends = 2 * entities.ends[:-1] + prefix_length
        return F.pad(ends, (1, 0), value=prefix_length - 1)

    def visibility(self, state: State, place: Tensor) -> Tensor:
        """Context in turn; instructions that are asked stand behind the context of their set, in
        turn among themselves (`hide_queries` hides them from all others).
        """
        assert state.prefix is not None
        index = place - state.prefix.length
        apart = state.entities.length + 1  # room between two context numbers for a set
        rank = (index % QUERY).clamp(min=0)
        before = first_of_entity(rank, state.entities)
        asked = (2 * before - 1) * apart + 1 + rank - before
        return torch.where(index >= QUERY, asked, index * apart)

    def positions(self, place: Tensor, state: State) -> Positions:
        """Instructions and tokens turn by their place on the layout; the class has rotation 0."""
        assert state.prefix is not None
        index = place - state.prefix.length
        order = state.entities.order
        order = order if order.ndim == 1 else state.rows(order)
        rank, _ = self.ranks_at(index.clamp(min=0))
        row = torch.where(index < 0, 0, 1 + spots_of(rank, order)).to(self.rope_cos.device)
        return Positions(self.rope_cos[row], self.rope_sin[row])

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None
        return Pass(
            self.positions(place, state), state.cache, self.hide_queries(place, state, slots)
        )

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        """Guidance goes by the share of tokens that are known before the set: w(k / N)."""
        assert self.output is not None
        logits = at_least_float32(self.output(hidden))
        known = first_of_entity(rank, state.entities)
        return Logits(state.guidance.merge(logits, known, self.by_token))

    def score(
        self, tokens: Tensor, condition: Condition, entities: Entities | None = None
    ) -> Distribution:
        """Token by token the interleaved sequence asks for everything itself: no further queries."""
        entities = entities or self.entities
        if set(entities.sizes) != {1}:
            return super().score(tokens, condition, entities)
        state = self._state(condition, NO_GUIDANCE, entities)
        state.cache = NoCache(tokens.device)
        assert state.prefix is not None
        prefix = state.prefix.length
        place = torch.arange(prefix + 2 * entities.length - 1)
        hidden = self._run(state, place[None], self.read(tokens, entities))[:, prefix::2]
        return self._distribution(state, hidden, entities.length, state.fed, entities.count)

    def context_rows(self, entities: Entities) -> tuple[Tensor, Tensor]:
        """Of the sequence that is scored token by token, as in training."""
        if set(entities.sizes) != {1}:
            raise UserError("RandAR is trained token by token: its sets have no rows of their own")
        ranks = torch.arange(entities.length - 1)
        return 2 * (ranks + 1 - entities.length), ranks

    def work(self) -> Work:
        """Training reads an instruction for each token, and all tokens but the last."""
        positions = 2 * self.layout.length
        attention = causal_attention_macs(len(self.layers), self.width, positions)
        blocks = linear_macs(self.layers)
        around = (linear_macs(self) - blocks) * self.layout.length
        return Work(positions, blocks * positions + attention, around)


# Published variants, of the sizes in models/parts/llama.py; parameters (16,384 codes, 1,000 classes): one vector more
# than LlamaGen's.
def randar_l(layout: Layout, num_classes: int = 1000, steps: int | None = 88) -> RandAR:
    """342,912,000 parameters."""
    return RandAR(layout, num_classes=num_classes, steps=steps, **SIZE_L)


def randar_xl(layout: Layout, num_classes: int = 1000, steps: int | None = 88) -> RandAR:
    """774,700,800 parameters."""
    return RandAR(layout, num_classes=num_classes, steps=steps, **SIZE_XL)


def randar_xxl(layout: Layout, num_classes: int = 1000, steps: int | None = 88) -> RandAR:
    """1,410,974,208 parameters."""
    return RandAR(layout, num_classes=num_classes, steps=steps, **SIZE_XXL)
