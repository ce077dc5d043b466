"""Position queries: the tokens of an entity are predicted at once, each asked for by its place
(LPD, arXiv 2507.01957).

    sequence   prefix | tokens of entity 0, 1 .. n - 1 in turn | queries of the places of entity n
    a token    sees the prefix and the tokens of entities up to its own
    a query    sees the prefix, the tokens of earlier entities, and the queries of its own entity

Nothing sees the query of another entity: its keys leave the cache with the pass that asked, and the
token that is drawn for it takes their slots. Training reads all tokens but those of the last entity
and the queries of all entities in one pass.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.kv_cache import KVCache, NoCache, Slots, flex_mask
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import State
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.work import Work, linear_macs

# Place of the query of the first token, behind the prefix; tokens have places 0 .. N - 1 there.
QUERY = 2**20


class PositionQueries(PrefixTransformer):
    """A stack of blocks over tokens and queries, in entities of any partition.

    A subclass says how an embedding is `placed`; its `shared` gives the blocks the slots of
    `hide_queries`.
    """

    token_embedding: nn.Embedding
    query: nn.Parameter  # what asks, wherever it asks: [D], or [1, 1, D]

    @abstractmethod
    def placed(self, x: Tensor, spot: Tensor) -> Tensor:
        """Embeddings [R, n, D] of tokens or queries, with the positions of their places [R or 1,
        n].
        """

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Tokens of the context, or queries (indices from QUERY on), each at its place."""
        rank, is_query = self.ranks_at(index)
        spot = spots_of(rank, entities.order).to(tokens.device)
        ids = tokens.gather(1, spot.expand(len(tokens), -1))
        asks = is_query.to(tokens.device)[..., None]
        return self.placed(torch.where(asks, self.asking(spot), self.token_embedding(ids)), spot)

    def ranks_at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of indices [R or 1, n] behind the prefix: whose token or query is read there, by
        generation rank, and whether it is the query.
        """
        return index % QUERY, index >= QUERY

    def asking(self, spot: Tensor) -> Tensor:
        """Embeddings of the queries of places [R or 1, n], as `placed` takes them."""
        return self.query

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
            # By queries: the context, and those of their own entity.
            seen = int(self.entities.ends[1:][number].sum()) + queries * self.prefix_length
            own = int((self.entities.ends[1:-1] * sizes[:-1]).sum()) + context * self.prefix_length
        attention = 2 * len(self.layers) * self.num_heads * self.head_dim * (seen + own)
        blocks = linear_macs(self.layers)
        positions = context + queries
        return Work(
            positions, blocks * positions + attention, (linear_macs(self) - blocks) * queries
        )

    def visibility(self, state: State, place: Tensor) -> Tensor:
        """Prefix up to 0; a token of entity n is n + 1, seen from the next entity on; a query of
        entity n is n.
        """
        assert state.prefix is not None
        index = place - state.prefix.length
        entity = entity_of_rank(index.clamp(min=0) % QUERY, state.entities)
        return torch.where(index < 0, index + 1, torch.where(index >= QUERY, entity, entity + 1))

    def hide_queries(self, place: Tensor, state: State, slots: Slots) -> Slots:
        """The visibility of blocks, less the queries of other entities."""
        assert state.prefix is not None
        index = place - state.prefix.length
        if not bool((index >= QUERY).any()):
            return slots
        asked = torch.where(
            index >= QUERY, entity_of_rank(index.clamp(min=0) % QUERY, state.entities), -1
        )
        if slots.mask is not None and not isinstance(slots.mask, Tensor):
            numbers = tuple(self.visibility(state, place)[0].tolist())
            groups = tuple(asked[0].tolist())
            return slots._replace(mask=flex_mask(numbers, state.prefix.embeddings.device, groups))
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
        state.cache = NoCache(tokens.device, self.attention == "flex")
        assert state.input_ends is not None and state.prefix is not None
        count = state.entities.count
        length = state.entities.length
        context = torch.arange(int(state.input_ends[-1]))
        queries = torch.arange(length) + QUERY + state.prefix.length
        hidden = self._run(
            state, torch.cat([context, queries])[None], self.read(tokens, state.entities)
        )
        return self._distribution(state, hidden, length, state.fed, count)


def spots_of(index: Tensor, order: Tensor) -> Tensor:
    """Places on the layout of the tokens at `index` [R or 1, n], which they or their queries have;
    clamped.
    """
    order = order.view(-1, order.shape[-1])
    rows = max(len(order), len(index))
    rank = (index % QUERY).clamp(max=order.shape[-1] - 1)
    return order.expand(rows, -1).gather(1, rank.expand(rows, -1))


def first_of_entity(rank: Tensor, entities: Entities) -> Tensor:
    """Generation rank of the first token of the entity that the token of each rank is in; grows past
    the end, never clamped.
    """
    entity = entity_of_rank(rank, entities)
    past = (entity - entities.count).clamp(min=0) * entities.sizes[-1]
    return entities.ends[entity.clamp(max=entities.count)] + past


def entity_of_rank(rank: Tensor, entities: Entities) -> Tensor:
    """Entity of tokens by generation rank; grows past the end, never clamped."""
    length = entities.length
    past = entities.count + (rank - length).div(entities.sizes[-1], rounding_mode="floor")
    return torch.where(rank < length, entities.numbers[rank.clamp(max=length - 1)], past)
