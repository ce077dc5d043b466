"""Speculative Jacobi decoding: judge a window of drafts in one pass, commit its accepted head,
draft the rest anew.

SJD (arXiv 2410.01699): the tokens that one pass samples behind its first rejection are the next
pass's drafts, so no draft model is needed. Exact with `plain_ratio` and the couplings `none`,
`maximal`, `gumbel`: tokens follow the guided, processed distribution of the generator. Approximate
with `GroupedRatio` (GSD, arXiv 2508.07747) or `Reuse` (SJD++).

Different from the official code: every image of a batch commits its own number of tokens
(committing the minimum and testing accepted drafts again with their old law is biased), filters are
applied once, and any layout, entity order and batch is taken, entities of several tokens included
if all are equally large, and tokens of several sub-tokens or bits, one an entity (`chains.py`).

Shapes: B images, W slots of a window (one entity each), s tokens an entity, or the s sub-tokens of
its one token, V codes. Slot j of the
window that begins behind m committed entities is entity m + j; all slots but the last of a full
window hold drafts.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Chained, Distribution, Draws, Logits
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Bits, Factorized, Layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_name, check_number, check_whole
from tessellar.sampling.acceptance import Acceptance, GroupedRatio, distance_quantile, plain_ratio
from tessellar.sampling.algorithm import Algorithm, check_in_order
from tessellar.sampling.chains import Drafts, verify_chain
from tessellar.sampling.couplings import COUPLINGS, Coupling, Reuse, Verdict, fresh, gumbel, verify
from tessellar.sampling.drafts import SCHEMES, Neighbourhood, fill, look_up, sources
from tessellar.sampling.report import Recorder, forward, running
from tessellar.sampling.siblings import further_drafts, judge_siblings

Init = Literal["random", "uniform", "repeat-left", "repeat-up", "argmax-left", "sample-left"]
CouplingName = Literal["none", "maximal", "gumbel"]
assert get_args(Init) == SCHEMES and set(get_args(CouplingName)) == set(COUPLINGS)

LARGEST_WINDOW = 64


@dataclass(frozen=True)
class Rules:
    """What a run does with a window: number of slots, initial drafts, acceptance test, coupling
    behind a rejection.
    """

    window: int = 16
    init: str = "random"
    acceptance: Acceptance = plain_ratio
    coupling: Coupling = fresh
    sub_tokens: tuple[Acceptance, ...] = ()
    siblings: int = 1  # drafts of the first place of a window

    def acceptances(self, count: int) -> tuple[Acceptance, ...]:
        """The test of each of `count` sub-tokens: `sub_tokens`, or the same for all."""
        return self.sub_tokens or (self.acceptance,) * count


DEFAULT_RULES = Rules()


@dataclass
class Window:
    """Drafts [B, W, s] by slot with the law [B, W, s, V] that each was drawn from; a slot without a
    draft has law 0.
    """

    draft: Tensor
    law: Tensor
    tied: Tensor | None  # [B, W, s, V] exponential noise of the Gumbel coupling

    def select(self, index: Tensor) -> "Window":
        return Window(
            self.draft[index], self.law[index], None if self.tied is None else self.tied[index]
        )


@dataclass
class Batch:
    """Images being decoded: where they go in the result, committed entities [b] (on the CPU),
    buffer [b, N], drafts.
    """

    image: Tensor
    state: State
    noise: Noise
    done: Tensor
    tokens: Tensor
    window: Window

    def select(self, index: Tensor) -> "Batch":
        """Some of the images; the caches of the others are dropped."""
        there = index.to(self.tokens.device)
        return Batch(
            self.image[index],
            self.state.select(index),
            self.noise.select(index),
            self.done[index],
            self.tokens[there],
            self.window.select(there),
        )


@torch.no_grad()
def speculative_jacobi(
    generator: Generator,
    condition: Condition,
    choice: Choice,
    noise: Noise,
    guidance: Guidance = NO_GUIDANCE,
    rules: Rules = DEFAULT_RULES,
    recorder: Recorder | None = None,
) -> Tensor:
    """Tokens [B, N] of a batch of conditions; image b depends on its own noise and condition alone.

    Raises UserError for generators whose tokens have no probabilities, or depend on each other
    within an entity.
    """
    with running(recorder, condition.batch, generator.layout.length, noise.device):
        state = generator.start(condition, guidance, window=rules.window)
        vocabs = sub_tokens(generator.layout)
        if not vocabs:
            require_windows(state, generator, "speculative decoding")
        elif set(state.entities.sizes) != {1}:
            raise UserError(
                f"speculative decoding of sub-tokens needs one token an entity; {type(generator).__name__} has "
                f"{sorted(set(state.entities.sizes))}"
            )
        if rules.siblings > 1 and (vocabs or set(state.entities.sizes) != {1}):
            raise UserError(
                f"siblings of drafts need tokens of one id, one by one; {type(generator).__name__} has others"
            )
        decoder = _Decoder(
            generator, choice, rules, Neighbourhood.of(generator.layout), vocabs, recorder
        )
        batch = decoder.begin(state, noise)
        result = batch.tokens.clone()
        while True:
            batch = decoder.step(batch)
            finished = batch.done >= state.entities.count
            if 2 * int(finished.sum()) < len(finished):
                continue
            result[batch.image.to(result.device)] = batch.tokens
            if bool(finished.all()):
                return result
            batch = batch.select((~finished).nonzero()[:, 0])


@dataclass(frozen=True)
class _Decoder:
    """What does not change between passes."""

    generator: Generator
    choice: Choice
    rules: Rules
    hood: Neighbourhood
    vocabs: tuple[int, ...]  # of the sub-tokens of a token; empty where it is one id
    recorder: Recorder | None

    def begin(self, state: State, noise: Noise) -> Batch:
        """Nothing committed, a window of initial drafts."""
        layout = self.generator.layout
        slots = self.rules.window
        size = len(self.vocabs) or state.entities.sizes[0]
        codes = max(self.vocabs) if self.vocabs else int(layout.vocab().max())
        tokens = layout.blank(state.batch).to(noise.device)
        done = torch.zeros(state.batch, dtype=torch.int64)
        draft = tokens.new_zeros(state.batch, slots, size)
        law = torch.zeros(*draft.shape, codes, device=noise.device)
        tied = noise.exponential(slots, size, codes) if self.rules.coupling is gumbel else None
        batch = Batch(
            torch.arange(state.batch), state, noise, done, tokens, Window(draft, law, tied)
        )
        return replace(
            batch,
            window=self._filled(batch, done, law[:, 0], torch.zeros(state.batch, slots) > 0),
        )

    def step(self, batch: Batch) -> Batch:
        """One evaluation of the generator: predict the window, judge it, commit, shift."""
        state = batch.state
        first = batch.done
        remaining = state.entities.count - first
        width = min(self.rules.window, int(remaining.max()))
        tokens = batch.tokens
        drafts = min(self.rules.window - 1, width)
        if drafts:
            put_in = self.values(batch.window.draft[:, :drafts])
            tokens = state.entities.put(tokens, first, drafts, put_in)
        state.rollback(first)
        if self.rules.siblings > 1:
            batch, p, judged = self.among_siblings(batch, tokens, width)
            state = batch.state
            verdict = self.judge(batch, judged)
        else:
            with forward(self.recorder, tokens.device):
                distribution = self.generator.predict(state, tokens, count=width)
            if self.vocabs:
                verdict = self.judge_chain(batch, distribution)
                p = verdict.law
            else:
                p = probabilities(distribution, self.choice, state)
                verdict = self.judge(batch, p)
        accepted = verdict.accepted.cpu()
        committed = torch.minimum((accepted + 1).clamp(max=width), remaining)
        if self.recorder is not None:
            self._record(self.recorder, first, remaining, accepted, committed, p)
        tokens = state.entities.put(tokens, first, width, self.values(verdict.tokens))
        batch = replace(batch, tokens=tokens, done=first + committed)
        return replace(batch, window=self.shift(batch, verdict, committed))

    def among_siblings(
        self, batch: Batch, tokens: Tensor, width: int
    ) -> tuple[Batch, Tensor, Tensor]:
        """The window evaluated behind each sibling of its first draft, and the batch as the one that
        stays leaves it; its laws [B, W, 1, V], and those to judge it by: the first place is decided.
        """
        count = self.rules.siblings
        window = batch.window
        noise = batch.noise
        first_law = window.law[:, 0, 0]
        codes = first_law.shape[-1]
        drafts, there = further_drafts(
            first_law, window.draft[:, 0, 0], count, noise.exponential(codes)
        )
        count = drafts.shape[1]
        images = torch.arange(len(drafts)).repeat_interleave(count)
        forks = batch.state.select(images)
        ahead = forks.entities.put(
            tokens[images.to(tokens.device)], forks.fed, 1, drafts.flatten()[:, None]
        )
        with forward(self.recorder, tokens.device):
            distribution = self.generator.predict(forks, ahead, count=width)
        every = rearrange(
            probabilities(distribution, self.choice, forks), "(b k) w s v -> b k w s v", k=count
        )
        chosen = judge_siblings(
            every[:, 0, 0, 0],
            first_law,
            drafts=drafts,
            there=there,
            uniform=noise.uniform(count),
            exponential=noise.exponential(codes),
        )
        rows = torch.arange(len(drafts), device=drafts.device)
        p = every[rows, chosen.branch]
        certain = torch.zeros_like(first_law).scatter_(-1, chosen.token[:, None], 1.0)
        judged = p.clone()
        judged[:, 0, 0] = certain
        law = window.law.clone()
        law[:, 0, 0] = certain * chosen.accepted[:, None]
        draft = window.draft.clone()
        draft[:, 0, 0] = chosen.token
        state = forks.select((rows * count + chosen.branch).cpu())
        return replace(batch, state=state, window=Window(draft, law, window.tied)), p, judged

    def values(self, slots: Tensor) -> Tensor:
        """Tokens [B, W, s] as the buffer takes them."""
        return slots if self.vocabs else slots.flatten(1)

    def judge_chain(self, batch: Batch, distribution: Distribution) -> Verdict:
        """Sub-token by sub-token; noise for the full window, as below."""
        if not isinstance(distribution, Chained):
            name = type(self.generator).__name__
            raise UserError(
                f"speculative decoding needs probabilities of tokens, which {name} has none of as it draws them"
            )
        slots = self.rules.window
        size = len(self.vocabs)
        width = distribution.shape[1]
        window = batch.window
        uniform = F.pad(batch.noise.uniform(slots - 1, size), (0, 0, 0, 1))
        exponential = batch.noise.exponential(slots, size, window.law.shape[-1])
        drafts = Drafts(
            window.draft[:, :width],
            window.law[:, :width],
            uniform=uniform[:, :width],
            exponential=exponential[:, :width],
            tied=None if window.tied is None else window.tied[:, :width],
        )
        return verify_chain(
            distribution, self.choice, drafts, self.rules.acceptances(size), self.rules.coupling
        )

    def judge(self, batch: Batch, p: Tensor) -> Verdict:
        """Noise is always drawn for the full window, so that it does not depend on the other
        images.
        """
        (_, width, size, codes), slots = p.shape, self.rules.window
        uniform = F.pad(batch.noise.uniform(slots - 1, size), (0, 0, 0, 1))[:, :width]
        exponential = batch.noise.exponential(slots, size, codes)[:, :width]
        window = batch.window
        rules = self.rules
        tied = None if window.tied is None else window.tied[:, :width]
        law = window.law[:, :width]
        draft = window.draft[:, :width]
        return verify(
            p,
            law,
            draft=draft,
            uniform=uniform,
            exponential=exponential,
            acceptance=rules.acceptance,
            coupling=rules.coupling,
            tied=tied,
        )

    def shift(self, batch: Batch, verdict: Verdict, committed: Tensor) -> Window:
        """The next window: tokens behind the committed ones with their laws, then initial drafts."""
        width = verdict.tokens.shape[1]
        slots = self.rules.window
        source = committed[:, None] + torch.arange(slots)
        there = source < width
        index = source.clamp(max=width - 1).to(verdict.tokens.device)
        rows = torch.arange(len(index), device=index.device)[:, None]
        tied = batch.window.tied
        if tied is not None:
            new = batch.noise.exponential(*tied.shape[1:])
            tied = torch.where(there.to(new.device)[..., None, None], tied[rows, index], new)
        window = Window(verdict.tokens[rows, index], verdict.law[rows, index], tied)
        last = (batch.done - committed + width) * batch.state.entities.sizes[0] - 1
        law = verdict.law[:, -1] if self.vocabs else verdict.law[:, -1, -1:]
        return self._filled(replace(batch, window=window), last, law, there)

    def _filled(self, batch: Batch, last: Tensor, law: Tensor, there: Tensor) -> Window:
        """Initial drafts where `there` [B, W] is False; `law` [B, F, V] is that of the last known
        token, rank `last`, and its sub-tokens (F = 1 where it has none).
        """
        window = batch.window
        entities = batch.state.entities
        scheme = self.rules.init
        device = law.device
        size = entities.sizes[0]
        drafts = self.rules.window - 1
        new_law = window.law
        draft = window.draft
        if drafts:
            ranks = entities.steps(batch.done, drafts)
            source = sources(scheme, self.hood, entities, ranks, last)
            place = look_up(entities.order, ranks.clamp(max=entities.length - 1))
            tokens = []
            laws = []
            for factor in range(len(self.vocabs) or 1):
                uniform = batch.noise.uniform(drafts * size)
                exponential = (
                    batch.noise.exponential(drafts * size, law.shape[-1])
                    if scheme == "sample-left"
                    else uniform
                )
                vocab = self.hood.vocab[place].to(device)
                known = batch.tokens
                if self.vocabs:
                    vocab = torch.full_like(vocab, self.vocabs[factor])
                    known = batch.tokens[..., factor]
                new = fill(
                    scheme,
                    source.to(device),
                    known=known,
                    vocab=vocab,
                    law=law[:, factor],
                    uniform=uniform,
                    exponential=exponential,
                )
                tokens.append(new.tokens)
                laws.append(new.law)
            # One token an entity where there are sub-tokens: s counts those of an entity, or of a token.
            filled = rearrange(torch.stack(tokens, -1), "b (w s) f -> b w (s f)", s=size)
            fresh_law = rearrange(torch.stack(laws, 2), "b (w s) f v -> b w (s f) v", s=size)
            keep = there[:, :drafts, None].to(device)
            draft[:, :drafts] = torch.where(keep, draft[:, :drafts], filled)
            new_law[:, :drafts] = torch.where(keep[..., None], new_law[:, :drafts], fresh_law)
        new_law[:, drafts:] = 0  # the last slot of a window has no draft
        return Window(draft, new_law, window.tied)

    def _record(
        self,
        recorder: Recorder,
        first: Tensor,
        remaining: Tensor,
        accepted: Tensor,
        committed: Tensor,
        p: Tensor,
    ) -> None:
        alive = remaining > 0
        drafted = remaining.clamp(max=self.rules.window - 1)
        accepted = torch.minimum(accepted, drafted)
        recorder.window(first[alive], accepted[alive], committed[alive], drafted[alive])
        slot = torch.arange(p.shape[1])
        flags = [
            (slot < n[:, None])[..., None].to(p.device)
            for n in (torch.minimum(accepted, committed), committed)
        ]
        recorder.certainty(p, *flags)


def sub_tokens(layout: Layout) -> tuple[int, ...]:
    """Vocabularies of the sub-tokens, or bits, of every token of a layout; empty where a token is one
    id or a vector.
    """
    kinds = {segment.kind for segment in layout.segments}
    kind = kinds.pop()
    if kinds:
        return ()
    match kind:
        case Factorized(vocabs):
            return vocabs
        case Bits(count):
            return (2,) * count
    return ()


def require_windows(state: State, generator: Generator, algorithm: str) -> None:
    """Raise UserError, in one line, unless windows of this generator can be judged token by token."""
    name = type(generator).__name__
    if not generator.layout.is_categorical:
        raise UserError(f"{algorithm} needs categorical tokens; {name} predicts {generator.layout}")
    if not state.entities.uniform:
        raise UserError(
            f"{algorithm} needs entities of one size; {name} predicts {sorted(set(state.entities.sizes))}"
        )


def probabilities(distribution: Distribution, choice: Choice, state: State) -> Tensor:
    """Processed probabilities [B, W, s, V]; raises UserError for a head whose tokens depend on each
    other.
    """
    if not isinstance(distribution, Logits):
        raise UserError(
            f"speculative decoding needs a head of independent logits, not {type(distribution).__name__}"
        )
    return rearrange(
        choice.probs(distribution.logits), "b (w s) v -> b w s v", s=state.entities.sizes[0]
    )


@dataclass(frozen=True)
class Windows(Algorithm):
    """What judges windows of drafts, which begin as `init` says, in the loop of SJD; a subclass
    gives the rules.
    """

    window: int = 16
    init: Init = "random"

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1, LARGEST_WINDOW)
        check_name("init", self.init, SCHEMES)

    @abstractmethod
    def rules(self, generator: Generator) -> Rules:
        """When a draft is accepted, and what becomes of those behind a rejection."""

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        check_in_order(generator)
        rules = self.rules(generator)
        return speculative_jacobi(
            generator,
            condition,
            choice=settings.choice,
            noise=noise,
            guidance=guidance,
            rules=rules,
            recorder=recorder,
        )


@dataclass(frozen=True)
class SpeculativeJacobi(Windows):
    """SJD (arXiv 2410.01699) and its exact couplings (SCD, 2510.24211): no draft model, exact."""

    coupling: CouplingName = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("coupling", self.coupling, tuple(COUPLINGS))

    def rules(self, generator: Generator) -> Rules:
        return Rules(self.window, self.init, coupling=COUPLINGS[self.coupling])


@dataclass(frozen=True)
class SiblingJacobi(SpeculativeJacobi):
    """SJD with `siblings` drafts of the first place of a window (SJD-PAC, arXiv 2603.18599), each
    evaluated with the window behind it: as many times the work of an evaluation. Exact.

    `init` must give a law (`uniform`, `sample-left`): what is certain has no siblings.
    """

    init: Init = "uniform"
    coupling: CouplingName = "maximal"
    siblings: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("siblings", self.siblings, 1, 16)

    def rules(self, generator: Generator) -> Rules:
        return replace(super().rules(generator), siblings=self.siblings)


@dataclass(frozen=True)
class ReusingJacobi(Windows):
    """SJD++ (arXiv 2512.07503): drafts behind a rejection stay where p / q exceeds `threshold`.
    Approximate.
    """

    threshold: float = 0.5

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, least=0)

    def rules(self, generator: Generator) -> Rules:
        return Rules(self.window, self.init, coupling=Reuse(self.threshold))


@dataclass(frozen=True)
class GroupedJacobi(SpeculativeJacobi):
    """GSD (arXiv 2508.07747): SJD that accepts by the mass of clusters of similar tokens.
    Approximate.

    The published `d_threshold` 0.5 fits Chameleon's embeddings: for other models give `d_quantile`,
    the share of pairs of codes that pass for near, which replaces it. `d_threshold` None switches
    the distance filter off.
    """

    group_size: int = 14
    p_threshold: float = 0.15
    d_threshold: float | None = 0.5
    d_quantile: float | None = None
    exact_official: bool = False

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("group_size", self.group_size, least=1)
        check_number("p_threshold", self.p_threshold, above=0)
        if self.d_threshold is not None:
            check_number("d_threshold", self.d_threshold, least=0)
        if self.d_quantile is not None:
            check_number("d_quantile", self.d_quantile, above=0, most=1)

    def acceptance(self, generator: Generator) -> GroupedRatio:
        """The acceptance rule with the generator's embeddings; raises UserError where it has none."""
        return self.of_table(generator.code_embeddings(), generator)

    def of_table(self, embeddings: Tensor | None, generator: Generator) -> GroupedRatio:
        """The rule over the codes of one table of embeddings."""
        threshold = self.d_threshold
        table = None
        if self.d_quantile is not None or threshold is not None:
            if embeddings is None:
                name = type(generator).__name__
                raise UserError(
                    f"GSD's distance filter needs one embedding a code, {name} has none; set d_threshold null"
                )
            table = embeddings.detach().float()
            threshold = (
                threshold if self.d_quantile is None else distance_quantile(table, self.d_quantile)
            )
        return GroupedRatio(
            self.group_size, self.p_threshold, threshold, table, self.exact_official
        )

    def rules(self, generator: Generator) -> Rules:
        coupling = COUPLINGS[self.coupling]
        count = len(sub_tokens(generator.layout))
        if not count:
            return Rules(self.window, self.init, self.acceptance(generator), coupling)
        embeddings = getattr(generator, "embeddings", None)
        tables: list[Tensor | None] = [None] * count
        if isinstance(embeddings, nn.ModuleList):
            tables = [table.weight for table in embeddings]  # type: ignore[misc]
        each = tuple(self.of_table(table, generator) for table in tables)
        return Rules(self.window, self.init, coupling=coupling, sub_tokens=each)
