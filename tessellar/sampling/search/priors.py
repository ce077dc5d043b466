"""Priors: what proposes the next entities of the sequences of one prompt.

A candidate is a beam with more entities behind it. `branch` says where the candidates of a beam part: at the
last new entity (FlexTok in the official code; everything before it is drawn once a beam), or at the first
(Janus there). Candidates that part at the last entity share their beam's cache: it is copied for those that are
kept (`State.select`).

Shapes: b beams, n candidates, k candidates a beam, N tokens, T tokens of an entity, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Draws, Logits
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Bits, Categorical, Factorized, Layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.report import Recorder, forward
from tessellar.sampling.settings import GREEDY

Branch = Literal["last", "first"]


class StreamNoise(Noise):
    """Draws [rows, *shape] from one stream: that of a prompt, for as many sequences as there are."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__([seed], device)
        self.rows = 1

    def of(self, rows: int) -> "StreamNoise":
        """The same stream, from now on for `rows` sequences."""
        self.rows = rows
        return self

    def _bits(self, *shape: int) -> Tensor:
        return super()._bits(self.rows, *shape)[0]


@dataclass(frozen=True)
class Branching:
    """How candidates part: drawn (else the likeliest ones), with or without `replacement`, and where."""

    sample: bool = True
    replacement: bool = False
    branch: Branch = "last"


LIKELIEST = Branching(sample=False)


@dataclass(frozen=True)
class Pool:
    """Sequences of one prompt, token buffers [n, N, ...] whose first `known` entities stand.

    `log_prob` [n] is that of all tokens that the prior gave, `last` [n] that of the last step's, float64 on the
    CPU; None without a likelihood. `parents` [n] are the beams that candidates come from, whose `state` they share.
    """

    tokens: Tensor
    known: int
    parents: Tensor
    log_prob: Tensor | None = None
    last: Tensor | None = None
    state: State | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Tensor) -> "Pool":
        """Sequences `index` [m], each with a state of its own."""
        index = index.to(self.tokens.device)
        parents = self.parents[index.cpu()]
        return Pool(
            tokens=self.tokens[index],
            known=self.known,
            parents=torch.arange(len(index)),
            log_prob=None if self.log_prob is None else self.log_prob[index.cpu()],
            last=None if self.last is None else self.last[index.cpu()],
            state=None if self.state is None else self.state.select(parents),
        )

    def without_copies(self, entities: Entities) -> "Pool":
        """Each sequence once, the first of equal ones; the state stays shared."""
        place = entities.order.expand(len(self), -1)[:, : int(entities.ends[self.known])]
        rows = take(self.tokens, place).flatten(1).tolist()
        first: dict[tuple, int] = {}
        for number, row in enumerate(rows):
            first.setdefault(tuple(row), number)
        kept = torch.tensor(list(first.values()))
        index = kept.to(self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[index],
            parents=self.parents[kept],
            log_prob=None if self.log_prob is None else self.log_prob[kept],
            last=None if self.last is None else self.last[kept],
        )


class Prior(ABC):
    """Proposes entities; `entities` are those of a sequence."""

    entities: Entities

    @abstractmethod
    def begin(self, given: Tensor | None = None, known: int = 0) -> Pool:
        """Beams that hold the first `known` entities of `given` [b, N, ...], or one empty beam."""

    @abstractmethod
    def extend(self, beams: Pool, known: int, candidates: int, how: Branching) -> Pool:
        """Up to `candidates` sequences of each beam, of `known` entities; those of a beam side by side."""


@dataclass
class GeneratorPrior(Prior):
    """A generator under a condition of one row; `noise` is the prompt's stream, `steps` the number of entities of
    a generator of random order.

    Raises UserError for the likeliest candidates of a generator without logits.
    """

    generator: Generator
    condition: Condition
    settings: Draws
    noise: StreamNoise
    guidance: Guidance = NO_GUIDANCE
    recorder: Recorder | None = None
    steps: int | None = None
    rounding: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        self.entities = self.generator.plan(self.noise.of(1), self.steps)

    @torch.no_grad()
    def begin(self, given: Tensor | None = None, known: int = 0) -> Pool:
        if given is None:
            given = self.generator.layout.blank(1)
        rows = len(given)
        one = torch.zeros(rows, dtype=torch.int64)
        entities = self.entities.select(one)
        device = next(ids.device for ids in self.condition if ids is not None)
        condition = self.condition.select(one.to(device))
        with self.rounding():
            state = self.generator.start(condition, self.guidance, entities)
        nothing = torch.zeros(rows, dtype=torch.float64)
        return Pool(
            tokens=given.to(self.noise.device),
            known=known,
            parents=torch.arange(rows),
            log_prob=nothing,
            last=nothing,
            state=state,
        )

    @torch.no_grad()
    def extend(self, beams: Pool, known: int, candidates: int, how: Branching) -> Pool:
        # Along the way `last` is the log-probability of what this call adds.
        start = replace(beams, last=torch.zeros(len(beams), dtype=torch.float64))
        with self.rounding():
            grown = self._grown(start, known, candidates, how)
        before = None if beams.log_prob is None else beams.log_prob[grown.parents]
        return replace(grown, log_prob=added(before, grown.last))

    def _grown(self, start: Pool, known: int, candidates: int, how: Branching) -> Pool:
        if how.branch == "first" and candidates > 1:
            parted = self._part(start, candidates, how)
            # Every candidate goes on by itself, in a copy of its beam's cache.
            alone = parted.select(torch.arange(len(parted)))
            return replace(self._walk(alone, known, how), parents=parted.parents)
        return self._part(self._walk(start, known - 1, how), candidates, how)

    def _noise(self, rows: int, how: Branching) -> StreamNoise:
        """The prompt's stream; what is not sampled leaves it untouched."""
        return self.noise.of(rows) if how.sample else StreamNoise(0, self.noise.device).of(rows)

    def _walk(self, beams: Pool, known: int, how: Branching) -> Pool:
        """The beams with one continuation each, up to `known` entities."""
        assert beams.state is not None
        tokens = beams.tokens
        last = beams.last
        for step in decode_from(
            self.generator,
            beams.state,
            self.settings if how.sample else GREEDY,
            self._noise(len(beams), how),
            tokens,
            first=beams.known,
            last=known,
            recorder=self.recorder,
        ):
            tokens = step.tokens
            entity = torch.full((len(beams),), step.entity)
            drawn = beams.state.entities.get(tokens, entity, 1)
            choice = self.settings.choice if how.sample else None
            last = added(last, log_prob_of(step.distribution, drawn, choice))
        return replace(beams, tokens=tokens, known=max(known, beams.known), last=last)

    def _part(self, beams: Pool, candidates: int, how: Branching) -> Pool:
        """The next entity of every beam, in several values."""
        state = beams.state
        assert state is not None
        rows = len(beams)
        count = beams.known + 1 - int(state.fed[0])
        with forward(self.recorder, beams.tokens.device):
            distribution = self.generator.predict(state, beams.tokens, count=count, want=1)
        if self.recorder is not None:
            self.recorder.plain(torch.full((rows,), beams.known))
        found = proposals(distribution, candidates, self.settings, self._noise(rows, how), how)
        there = found.valid.flatten()
        parents = torch.arange(rows).repeat_interleave(found.valid.shape[1])[there.cpu()]
        entities = state.entities.select(parents)  # images of random order have orders of their own
        entity = torch.full((len(parents),), beams.known)
        tokens = beams.tokens[parents.to(beams.tokens.device)]
        last = None
        if found.log_prob is not None and beams.last is not None:
            last = beams.last[parents] + found.log_prob.flatten()[there].double().cpu()
        return Pool(
            tokens=entities.put(tokens, entity, 1, found.values.flatten(0, 1)[there]),
            known=beams.known + 1,
            parents=parents,
            last=last,
            state=state,
        )


class Proposals(NamedTuple):
    """Values [b, k, T, ...] of an entity, their log-probabilities [b, k], and which of them there are."""

    values: Tensor
    log_prob: Tensor | None
    valid: Tensor


def added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum [n] in float64 on the CPU; None where a part has no likelihood."""
    if total is None or more is None:
        return None
    return total + more.double().cpu()


def log_prob_of(distribution: Distribution, values: Tensor, choice: Choice | None) -> Tensor | None:
    """Log-probability [b] of an entity's values [b, T, ...].

    Of logits under `choice` (temperature and filters) where one is given. Of tokens of several parts without
    temperature and filters, as their heads give it.
    """
    if choice is not None and isinstance(distribution, Logits):
        probs = choice.probs(distribution.logits).gather(-1, values[..., None])[..., 0]
        return probs.log().sum(1)
    found = distribution.log_prob(values)
    return None if found is None else found.sum(1)


def proposals(
    distribution: Distribution, count: int, settings: Draws, noise: Noise, how: Branching
) -> Proposals:
    """Up to `count` values of an entity for each of the b beams.

    Single tokens are drawn without replacement by the exponential race (its first `count` arrivals are such a
    sample); entities of several tokens and heads of several parts are drawn independently. The likeliest
    values of several independent tokens are found exactly. Raises UserError for the likeliest ones of a
    prediction without logits.
    """
    if isinstance(distribution, Logits) and not how.sample:
        return likeliest(distribution.logits, count)
    single = isinstance(distribution, Logits) and distribution.logits.shape[1] == 1
    if isinstance(distribution, Logits) and single and not how.replacement:
        probs = settings.choice.probs(distribution.logits)[:, 0]
        arrival = probs / noise.exponential(1, probs.shape[-1])[:, 0]
        first = arrival.topk(min(count, probs.shape[-1])).indices
        drawn = probs.gather(-1, first)
        return Proposals(first[..., None], drawn.log(), drawn > 0)
    if not how.sample and count > 1:
        raise UserError(
            f"{type(distribution).__name__} has no likeliest values to list: search with sample true"
        )
    draws = settings if how.sample else GREEDY
    values = [distribution.sample(draws, noise) for _ in range(count)]
    choice = settings.choice if how.sample else None
    each = [log_prob_of(distribution, drawn, choice) for drawn in values]
    known = [log_prob for log_prob in each if log_prob is not None]
    log_prob = torch.stack(known, 1) if known else None
    stacked = torch.stack(values, 1)
    valid = torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
    return Proposals(stacked, log_prob, valid)


def likeliest(logits: Tensor, count: int) -> Proposals:
    """The `count` likeliest values of T independent tokens, of logits [b, T, V], best first; of equal ones the
    first indices.
    """
    log_probs = logits.float().log_softmax(-1)
    ranked, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    ranked = ranked[..., :count]
    ids = ids[..., :count]
    best = ranked[:, 0]
    values = ids[:, 0, :, None]
    for place in range(1, logits.shape[1]):
        # The best of all combinations of what was best so far with the best of this token.
        together = (best[:, :, None] + ranked[:, place, None, :]).flatten(1)
        best, index = together.sort(dim=-1, descending=True, stable=True)
        best = best[:, :count]
        index = index[:, :count]
        before = index.div(ranked.shape[-1], rounding_mode="floor")
        token = ids[:, place].gather(1, index % ranked.shape[-1])
        earlier = values.gather(1, before[..., None].expand(-1, -1, values.shape[-1]))
        values = torch.cat([earlier, token[..., None]], -1)
    return Proposals(values, best, best > -torch.inf)


@dataclass
class UniformPrior(Prior):
    """Every new token is drawn uniformly from the layout's vocabulary, each candidate by itself (AR-free
    search); there is no likelihood. Raises UserError for tokens of real numbers.
    """

    layout: Layout
    entities: Entities
    noise: StreamNoise

    def __post_init__(self) -> None:
        self.sizes = vocabulary_sizes(self.layout)

    def begin(self, given: Tensor | None = None, known: int = 0) -> Pool:
        tokens = self.layout.blank(1) if given is None else given
        return Pool(tokens.to(self.noise.device), known, torch.arange(len(tokens)))

    def extend(self, beams: Pool, known: int, candidates: int, how: Branching) -> Pool:
        parents = torch.arange(len(beams)).repeat_interleave(candidates)
        tokens = beams.tokens[parents.to(beams.tokens.device)]
        first = torch.full((len(parents),), beams.known)
        count = known - beams.known
        places = self.entities.indices(first, count)
        sizes = self.sizes[places[0]]
        draws = self.noise.of(len(parents)).uniform(*sizes.shape)
        # A float just below 1 may round up to the size.
        values = torch.minimum((draws * sizes.to(draws.device)).long(), sizes.to(draws.device) - 1)
        return Pool(self.entities.put(tokens, first, count, values), known, parents)


def vocabulary_sizes(layout: Layout) -> Tensor:
    """How many values each position [N], or sub-token of one [N, F], may hold; raises UserError for real
    numbers.
    """
    sizes = []
    for segment in layout.segments:
        match segment.kind:
            case Categorical(vocab):
                one = torch.tensor(vocab)
            case Factorized(vocabs):
                one = torch.tensor(vocabs)
            case Bits(n):
                one = torch.full((n,), 2)
            case _:
                raise UserError(
                    f"tokens drawn uniformly need a vocabulary; this layout is {layout}"
                )
        sizes.append(one.expand(segment.length, *one.shape))
    return torch.cat(sizes)
