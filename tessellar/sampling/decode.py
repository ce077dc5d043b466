"""The decoding loop: predict the next entity, draw it, put it into the buffer. It knows no
generator.

Exact: tokens follow the guided, processed distribution of the generator. One network evaluation an
entity.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Draws, Implicit, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.captured import decode_captured
from tessellar.sampling.report import Recorder, forward, running


class Step(NamedTuple):
    """One decoded entity: its number, its distribution, the token buffer [B, N, ...] behind it."""

    entity: int
    distribution: Distribution
    tokens: Tensor


def decode_from(
    generator: Generator,
    state: State,
    settings: Draws,
    noise: Noise,
    tokens: Tensor,
    first: int = 0,
    last: int | None = None,
    recorder: Recorder | None = None,
    kept: Tensor | None = None,
    skip: bool = True,
) -> Iterator[Step]:
    """Decode entities `first` .. `last` (exclusive; default: all). Tokens before `first` are taken
    as given.

    In-painting and prompts are that: a filled buffer and a `first`; the given entities are fed in
    one evaluation. Tokens at places that are `kept` [N] stay as they are in the buffer wherever they
    stand; with `skip` no step is made for entities that are kept as a whole.
    """
    for n in range(first, state.entities.count if last is None else last):
        entity = torch.full((state.batch,), n)
        free: Tensor | None = None
        if kept is not None:
            free = ~kept.to(state.entities.order.device)[state.entities.indices(entity, 1)]
            if skip and not bool(free.any()):
                continue
        with forward(recorder, tokens.device):
            distribution = generator.predict(state, tokens, count=n + 1 - int(state.fed[0]), want=1)
        if recorder is not None:
            recorder.plain(entity)
            if recorder.entropy and isinstance(distribution, Logits):
                p = settings.choice.probs(distribution.logits)
                committed = torch.ones(p.shape[:-1], dtype=torch.bool, device=p.device)
                recorder.certainty(p, ~committed, committed)
            if isinstance(distribution, Implicit):
                distribution = replace(distribution, model=recorder.solved(distribution.model))
        drawn = distribution.sample(settings, noise)
        tokens = state.entities.put(tokens, entity, 1, drawn, keep=free)
        yield Step(n, distribution, tokens)


class EntityByEntity(Algorithm):
    """The loop of algorithms whose steps put one entity after the other into place."""

    @abstractmethod
    def steps_of(
        self,
        generator: Generator,
        state: State,
        settings: Draws,
        noise: Noise,
        tokens: Tensor,
        recorder: Recorder | None,
    ) -> Iterator[Step]:
        """The steps from an empty buffer `tokens` to the last entity."""

    def plan(self, generator: Generator, noise: Noise) -> Entities:
        """The partition to decode in."""
        return generator.plan(noise)

    @torch.no_grad()
    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        with running(recorder, condition.batch, generator.layout.length, noise.device):
            state = generator.start(condition, guidance, self.plan(generator, noise))
            tokens = generator.layout.blank(condition.batch).to(noise.device)
            if self.compile:
                with forward(recorder, tokens.device):
                    tokens = decode_captured(generator, state, settings, noise, tokens)
                count_plain(recorder, state)
                return tokens
            for step in self.steps_of(generator, state, settings, noise, tokens, recorder):
                tokens = step.tokens
        return tokens


def count_plain(recorder: Recorder | None, state: State) -> None:
    """Tell a recorder of one evaluation an entity; raises UserError where it asks for entropies,
    which a captured step does not give.
    """
    if recorder is None:
        return
    if recorder.entropy:
        raise UserError("a compiled step gives no entropies: leave algorithm.compile out")
    for entity in range(state.entities.count):
        recorder.plain(torch.full((state.batch,), entity))


@dataclass(frozen=True)
class Ancestral(EntityByEntity):
    """Entity by entity, one evaluation each; every generator and every head. Exact.

    `steps`: number of entities, for generators of random order. `compile`: the whole step as one
    compiled function, replayed as a CUDA graph on a GPU; for generators whose entities all have as
    many tokens. Compiling takes up to minutes, once a process and batch size. `int8`: matrices
    rounded to 8 bits, on a CPU, for one image at a time: other values, so other tokens.
    """

    steps: int | None = None
    compile: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_whole("steps of Ancestral", self.steps, least=1)
        if self.compile and self.int8:
            raise UserError("int8 weights are none that a compiler can read: leave one of them out")

    def plan(self, generator: Generator, noise: Noise) -> Entities:
        return generator.plan(noise, self.steps)

    def steps_of(
        self,
        generator: Generator,
        state: State,
        settings: Draws,
        noise: Noise,
        tokens: Tensor,
        recorder: Recorder | None,
    ) -> Iterator[Step]:
        return decode_from(generator, state, settings, noise, tokens, recorder=recorder)
