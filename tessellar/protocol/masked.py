"""Masked generators: every prediction is made anew from the known tokens, in any order, without a
cache.

The known tokens are those of the entities before `state.fed`; where they stand is
`state.entities.order`, which a decoding algorithm may write as it goes
(`tessellar/sampling/confidence.py`) or draw beforehand.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance


class MaskedGenerator(Generator):
    """A subclass says how unknown tokens follow from known ones (`fill`)."""

    @abstractmethod
    def fill(
        self, state: State, tokens: Tensor, known: Tensor, places: Tensor, entity: Tensor
    ) -> Distribution:
        """Distribution of the tokens at `places` [B, T] of the buffer [B, N, ...], whose `known`
        [B, N] count.

        `entity` [B, T] is what guidance takes them for.
        """

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        fed = torch.zeros(condition.batch, dtype=torch.int64)
        return State(
            self.stack_branches(condition, guidance), guidance, entities or self.entities, fed
        )

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        """One pass for each wanted entity; raises UserError for several where the head is not of
        logits.
        """
        want = count if want is None else want
        state.advance(count)
        parts = [self._entity(state, tokens, state.fed - want + i) for i in range(want)]
        if want == 1:
            return parts[0]
        logits = [part.logits for part in parts if isinstance(part, Logits)]
        if len(logits) < want:
            raise UserError(f"{type(self).__name__} predicts one entity at a time")
        return Logits(torch.cat(logits, 1))

    def start_places(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
    ) -> State:
        return self.start(condition, guidance, entities)

    def predict_places(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Distribution:
        """Guided as entity `fed`; tokens of a window never see each other, so groups are one."""
        places = places.clamp(min=0).cpu()
        entity = state.fed[:, None].expand_as(places)
        return self.fill(state, tokens, known_before(state, state.fed), places, entity)

    def predict_rest(self, state: State, tokens: Tensor) -> Distribution:
        """All N tokens, given those of the entities before `state.fed`; guided as entity `fed`."""
        places = torch.arange(self.layout.length).expand(state.batch, -1)
        return self.predict_places(state, tokens, places)

    def _entity(self, state: State, tokens: Tensor, number: Tensor) -> Distribution:
        places = state.entities.indices(number, 1)
        entity = state.entities.entity_of(number, 1)
        return self.fill(state, tokens, known_before(state, number), places, entity)


def known_before(state: State, number: Tensor) -> Tensor:
    """[B, N], True at tokens of the entities before `number` [B]; on the CPU."""
    entities = state.entities
    order = entities.order.expand(state.batch, -1)
    done = torch.arange(entities.length) < entities.ends[number.clamp(max=entities.count)][:, None]
    return torch.zeros_like(done).scatter(1, order, done)
