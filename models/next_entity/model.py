"""Next-entity prediction over a categorical layout: the tokens of an entity, whatever it is, at
once, by queries.

The architecture of LPD (arXiv 2507.01957): known tokens are context, and each token to be predicted
has a query (a learned vector and the position of its place). Queries see the context of earlier
entities and the queries of their own entity; nothing sees a query of another entity, and their keys
leave the cache after the pass. Context is causal by entity. Training reads context and the queries
of all entities in one pass.

Different from LPD: blocks are Llama's, any partition of any layout with categories is an X (LPD's
own order is `local:STEPS`), and one fixed partition is trained unless `random_order` asks for
random ones of the same sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.layers.llama import Pass, Positions
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.llama import ClassPrefix, LlamaGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, parse_entities
from tessellar.protocol.generator import State
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.layout import Layout
from tessellar.protocol.work import Work, linear_macs

# Place of the query of the first token, behind the prefix; tokens have places 0 .. N - 1 there.
QUERY = 2**20


class NextEntity(LlamaGenerator):
    """Class-conditional generator of the entities `x` (as `parse_entities` reads it) of a
    categorical layout.

    `random_order` is the share of training samples with a uniform order of their own, in entities
    of the same sizes; a model that has seen them decodes in any partition of such sizes. Raises
    UserError for tokens without categories.
    """

    def __init__(
        self,
        layout: Layout,
        x: str = "cell:2",
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        random_order: float = 0.0,
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
        if not layout.is_categorical:
            raise UserError(
                f"NextEntity predicts categorical tokens; this tokenizer gives {layout}"
            )
        self.layout = layout
        self.entities = parse_entities(x, layout)
        self.random_order = random_order
        # Sizes are read while the model is built, on the meta device too.
        with torch.device("cpu"):
            self.vocab = layout.vocab()
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.token_embedding = nn.Embedding(int(self.vocab.max()), width)
        self.position_embedding = nn.Embedding(layout.length, width)
        self.query = nn.Parameter(torch.empty(width))
        self.output = nn.Linear(width, int(self.vocab.max()), bias=False)
        cos, sin = rope_table(layout, 0, self.head_dim, rope_base)
        # Row 0: the prefix.
        self.set_rotations(F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0)))
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool = False) -> None:
        super().init_weights(zero_init_residual)
        nn.init.normal_(self.query, std=0.02)

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """The input of an entity is the tokens of the one before; of the first, the last position
        of the prefix.
        """
        return F.pad(entities.ends[:-1] + prefix_length, (1, 0), value=prefix_length - 1)

    def context_rows(self, entities: Entities) -> tuple[Tensor, Tensor]:
        ranks = torch.arange(entities.length - entities.sizes[-1])
        return ranks - len(ranks) - entities.length, ranks

    def work(self) -> Work:
        """Training reads each token (but those of the last entity) and a query for each token."""
        context = self.layout.length - self.entities.sizes[-1] + self.prefix_length
        queries = self.layout.length
        with torch.device("cpu"):
            number = self.entities.numbers
            sizes = torch.tensor(self.entities.sizes)
            # Context, own queries.
            seen = int(self.entities.ends[1:][number].sum()) + queries * self.prefix_length
            own = int((self.entities.ends[1:-1] * sizes[:-1]).sum()) + context * self.prefix_length
        attention = 2 * len(self.layers) * self.num_heads * self.head_dim * (seen + own)
        blocks = linear_macs(self.layers)
        positions = context + queries
        return Work(
            positions, blocks * positions + attention, (linear_macs(self) - blocks) * queries
        )

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Tokens of the context, or queries (indices from QUERY on), each with the position of its
        place.
        """
        spot = _spots(index, entities.order).to(tokens.device)
        ids = tokens.gather(1, spot.expand(len(tokens), -1))
        is_query = (index >= QUERY).to(tokens.device)[..., None]
        return torch.where(
            is_query, self.query, self.token_embedding(ids)
        ) + self.position_embedding(spot)

    def positions(self, place: Tensor, state: State) -> Positions:
        """Tokens and queries turn by their place on the layout, whatever the order; the prefix does
        not turn.
        """
        assert state.prefix is not None
        index = place - state.prefix.length
        order = (
            state.entities.order
            if state.entities.order.ndim == 1
            else state.rows(state.entities.order)
        )
        row = torch.where(index < 0, 0, _spots(index.clamp(min=0), order) + 1).to(
            self.rope_cos.device
        )
        return Positions(self.rope_cos[row], self.rope_sin[row])

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None
        return Pass(
            self.positions(place, state), state.cache, self.hide_queries(place, state, slots)
        )

    def visibility(self, state: State, place: Tensor) -> Tensor:
        """Prefix up to 0; a token of entity n is n + 1, seen from the next entity on; a query of
        entity n is n.
        """
        # Queries lie QUERY places behind the tokens; `hide_queries` keeps them from one another.
        assert state.prefix is not None
        index = place - state.prefix.length
        entity = _entity_of(index.clamp(min=0) % QUERY, state.entities)
        return torch.where(index < 0, index + 1, torch.where(index >= QUERY, entity, entity + 1))

    def hide_queries(self, place: Tensor, state: State, slots: Slots) -> Slots:
        """The visibility of blocks, less the queries of other entities."""
        assert state.prefix is not None
        index = place - state.prefix.length
        if not bool((index >= QUERY).any()):
            return slots
        asked = torch.where(
            index >= QUERY, _entity_of(index.clamp(min=0) % QUERY, state.entities), -1
        )
        asked = asked.to(slots.index.device).expand(max(len(asked), len(slots.index)), -1)
        keys = asked.new_full((len(asked), slots.stop), -1).scatter_(
            1, slots.index.expand(len(asked), -1), asked
        )
        visible = (keys[:, None] < 0) | (keys[:, None] == asked[..., None])
        if slots.mask is not None:
            mask = slots.mask & visible[:, None].to(slots.mask.device)
        else:
            mask = visible[:, None].tril() if slots.is_causal else visible[:, None]
        return slots._replace(mask=None if bool(mask.all()) else mask, is_causal=False)

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        """Room for the queries of all entities too, so that a whole image can be scored through the
        cache.
        """
        return super()._new_cache(rows, capacity + max(capacity, self.layout.length))

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        want = count if want is None else want
        first = state.fed + (count - want)
        ranks = state.entities.steps(first, want)
        queries = ranks + QUERY + state.prefix.length  # type: ignore[union-attr]
        context = state.places(count)
        asked = queries[:1] if len(context) == 1 else state.rows(queries)
        hidden = self._run(state, torch.cat([context, asked], dim=1), tokens)
        if isinstance(state.cache, KVCache):
            state.cache.truncate(state.cache.lengths - asked.shape[1])
        state.advance(count)
        return self._distribution(state, hidden, asked.shape[1], first, want)

    def score(
        self, tokens: Tensor, condition: Condition, entities: Entities | None = None
    ) -> Distribution:
        """Teacher-forced distribution of all entities in one pass, [prefix, context, queries of all
        entities].
        """
        state = self._state(condition, NO_GUIDANCE, entities or self.entities)
        state.cache = NoCache(tokens.device)
        assert state.input_ends is not None and state.prefix is not None
        count = state.entities.count
        length = state.entities.length
        context = torch.arange(int(state.input_ends[-1]))
        queries = torch.arange(length) + QUERY + state.prefix.length
        hidden = self._run(
            state, torch.cat([context, queries])[None], self.read(tokens, state.entities)
        )
        return self._distribution(state, hidden, length, state.fed, count)

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        logits = super().head(state, hidden, first, want).logits
        if bool((self.vocab == self.vocab[0]).all()):
            return Logits(logits)
        sizes = self.vocab[state.entities.indices(first, want)].to(logits.device)
        absent = torch.arange(logits.shape[-1], device=logits.device) >= sizes[..., None]
        return Logits(logits.masked_fill(absent, -torch.inf))


def _spots(index: Tensor, order: Tensor) -> Tensor:
    """Places on the layout of the tokens at `index` [R or 1, n], which they or their queries have;
    clamped.
    """
    order = order.view(-1, order.shape[-1])
    rows = max(len(order), len(index))
    rank = (index % QUERY).clamp(max=order.shape[-1] - 1)
    return order.expand(rows, -1).gather(1, rank.expand(rows, -1))


def _entity_of(rank: Tensor, entities: Entities) -> Tensor:
    """Entity of tokens by generation rank; grows past the end, never clamped."""
    length = entities.length
    past = entities.count + (rank - length).div(entities.sizes[-1], rounding_mode="floor")
    return torch.where(rank < length, entities.numbers[rank.clamp(max=length - 1)], past)
