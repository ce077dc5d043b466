"""A generator that is a table: every conditional distribution is stored, so the law of whole images
is known exactly.

For testing decoding algorithms against the truth (`joint`) and for trying them out; nothing to
train. Any categorical layout with one small vocabulary; entities of one size, whose tokens are
independent given the entities before them.
"""

from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.kv_cache import PlacedCache
from tessellar.protocol.arguments import AMOUNTS
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Generator, State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Layout

MOST_ROWS = 2**22


class TableGenerator(Generator):
    """Random logits, normal with standard deviation `spread`, for every class, place and prefix.

    `num_classes` classes and a null class; `entity_size` tokens an entity. Raises UserError where
    the table would be too large.
    """

    ranges: ClassVar = {"spread": AMOUNTS}

    def __init__(
        self,
        layout: Layout,
        num_classes: int = 3,
        entity_size: int = 1,
        spread: float = 1.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.num_classes = num_classes
        self.entity_size = entity_size
        self.codes = require_categorical(layout, "a table")
        self.conditioning = ClassConditioning(num_classes)
        if layout.length % entity_size:
            raise ValueError(f"{layout.length} tokens do not divide into entities of {entity_size}")
        self.entities = Entities(
            token_order(layout).order, (entity_size,) * (layout.length // entity_size)
        )
        prefixes = [self.codes ** (rank - rank % entity_size) for rank in range(layout.length)]
        if sum(prefixes) * self.codes > MOST_ROWS:
            raise UserError(f"a table of {layout} would have {sum(prefixes)} rows of {self.codes}")
        self.register_buffer("starts", torch.tensor([0, *prefixes[:-1]]).cumsum(0))
        self.starts: Tensor
        noise = torch.randn(
            num_classes + 1,
            sum(prefixes),
            self.codes,
            generator=torch.Generator().manual_seed(seed),
        )
        self.table = torch.nn.Parameter(spread * noise)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        state = self.start(self.drop_condition(condition))
        return {
            "cross_entropy": self.predict(state, tokens, state.entities.count).cross_entropy(
                tokens, weight
            )
        }

    def nats(self, tokens: Tensor, condition: Condition) -> Tensor:
        state = self.start(condition)
        scores = self.predict(state, tokens, state.entities.count)
        return -scores.log_prob(_generated(tokens, state.entities)).sum(1)

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        rows = self.stack_branches(condition, guidance)
        return State(
            rows,
            guidance,
            entities or self.entities,
            torch.zeros(condition.batch, dtype=torch.int64),
        )

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Logits:
        want = count if want is None else want
        state.advance(count)
        first = state.fed - want
        rank = state.entities.steps(first, want).clamp(max=self.layout.length - 1).to(tokens.device)
        logits = self.logits_at(
            state.rows(_generated(tokens, state.entities)), state.rows(rank), state.condition
        )
        return Logits(state.merge(logits, state.entities.entity_of(first, want)))

    def start_places(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
    ) -> State:
        """What is read are digits of the prefix; those that nobody may see count as code 0."""
        if self.entity_size > 1:
            return super().start_places(condition, guidance, entities)
        state = self.start(condition, guidance, entities)
        rows = state.condition.batch
        device = self.table.device
        data = torch.zeros(1, 2, rows, 1, self.layout.length + 1, 1, device=device)
        kept = torch.zeros(rows, self.layout.length + 1, dtype=torch.bool, device=device)
        state.cache = PlacedCache(data, kept, torch.zeros_like(kept, dtype=torch.int64))
        return state

    def predict_places(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Logits:
        assert isinstance(state.cache, PlacedCache) and state.condition.ids is not None
        rank = state.entities.ranks_of(places.clamp(min=0))
        groups = torch.zeros_like(places) if groups is None else groups
        slot = state.rows(torch.where(places < 0, -1, rank))
        slots = state.cache.reserve(slot, state.rows(groups), state.rows(rank))
        # The slot of rank r holds the token of rank r - 1, as its share of the prefix's number.
        generated = state.rows(_generated(tokens, state.entities))
        before = (state.rows(rank) - 1).to(tokens.device)
        weight = self.codes ** before.clamp(min=0)
        digits = torch.where(before < 0, 0, generated.gather(1, before.clamp(min=0)) * weight)
        read = digits[:, None, :, None].float()
        _, shares = state.cache.write(0, slots, read, read)
        assert isinstance(slots.mask, Tensor)
        prefix = (shares[:, :, None, :, 0] * slots.mask).sum(-1)[:, 0].long()
        row = self.starts[before + 1] + prefix
        logits = self.table[state.condition.ids[:, None], row]
        return Logits(state.merge(logits, state.entities.entity_at(rank)))

    def logits_at(self, generated: Tensor, rank: Tensor, condition: Condition) -> Tensor:
        """Logits [R, T, V] at generation ranks [R, T], given tokens [R, N] in generation order."""
        assert condition.ids is not None
        weights = self.codes ** torch.arange(self.layout.length, device=generated.device)
        before = torch.cat(
            [generated.new_zeros(len(generated), 1), (generated * weights).cumsum(1)], dim=1
        )
        prefix = before.gather(1, rank - rank % self.entity_size)
        return self.table[condition.ids[:, None], self.starts[rank] + prefix]

    @torch.no_grad()
    def joint(
        self, condition: Condition, sampler: Choice, guidance: Guidance = NO_GUIDANCE
    ) -> Tensor:
        """Exact law [B, V^N] of whole images under processing and guidance; images in the order of
        `outcomes`.
        """
        images = self.outcomes()
        state = self.start(
            condition.select(torch.arange(condition.batch).repeat_interleave(len(images))), guidance
        )
        tokens = images.repeat(condition.batch, 1)
        laws = sampler.probs(self.predict(state, tokens, state.entities.count).logits)
        generated = _generated(tokens, state.entities)
        return (
            laws.double().gather(-1, generated[..., None]).prod(1)[:, 0].view(condition.batch, -1)
        )

    def outcomes(self) -> Tensor:
        """All V^N images [V^N, N]; the first token varies slowest."""
        return torch.tensor(list(product(range(self.codes), repeat=self.layout.length)))


def _generated(tokens: Tensor, entities: Entities) -> Tensor:
    """Tokens [B, N] in generation order."""
    return tokens.gather(1, entities.order.expand(len(tokens), -1).to(tokens.device))
