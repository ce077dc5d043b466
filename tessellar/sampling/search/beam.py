"""Beam search, look-ahead search, and search without a generator, over the entities of a sequence.

Verifier calls of a beam of width b with k candidates in S steps: k + min(b, k) k + (S - 2) b k where b k >= b.
Different from the official code (`exact_official` restores it where results differ): sequences are finished and
scored anew before the best one is named, equal scores are ordered by candidate, a schedule that has reached the
end stops, a resumed search goes on at its step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.generator import Generator
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.search.priors import (
    LIKELIEST,
    Branch,
    Branching,
    Pool,
    Prior,
    UniformPrior,
    vocabulary_sizes,
)
from tessellar.sampling.search.schedules import Even, Geometric, SearchSchedule
from tessellar.sampling.search.searching import (
    MOST_CANDIDATES,
    Choices,
    Found,
    Judge,
    NothingKept,
    Progress,
    Search,
    SearchStep,
    Task,
    ranked,
)
from tessellar.sampling.search.verifiers import Likelihood, Verifier
from tessellar.sampling.settings import Sampling


@dataclass(frozen=True)
class Beam(Search):
    """Beam search: `width` sequences are kept; at each step of `schedule` each grows into `candidates`.

    `sample`: candidates are drawn (else they are the likeliest ones), with or without `replacement`. `branch`:
    they part at the last or the first new entity. `shared`: so many entities at the start are drawn once, for
    all (scales below the first that is searched). `scale_first_step`: few beams have more candidates, up to
    `width` times. `dedup`: equal candidates are scored once. `complete`: sequences are finished with the
    likeliest tokens where the schedule ends before them. `unconditional`: the generator sees no condition, the
    verifier does. `exact_official`: only the results are finished, and keep their order.
    """

    verifier: Verifier = Likelihood()
    width: int = 5
    candidates: int = 10
    schedule: SearchSchedule = Geometric()  # noqa: RUF009
    sample: bool = True
    replacement: bool = False
    branch: Branch = "last"
    shared: int = 0
    scale_first_step: bool = False
    dedup: bool = False
    complete: bool = True
    unconditional: bool = False
    exact_official: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_whole(f"width of {name}", self.width, least=1, most=MOST_CANDIDATES)
        check_whole(f"candidates of {name}", self.candidates, least=1, most=MOST_CANDIDATES)
        check_whole(f"shared of {name}", self.shared, least=0)
        check_whole("batch_size of the search", self.batch_size, least=1, most=MOST_CANDIDATES)

    def check(self, generator: Generator, sampling: Sampling) -> None:
        super().check(generator, sampling)
        if not isinstance(sampling.algorithm, Ancestral) or sampling.algorithm.compile:
            name = type(sampling.algorithm).__name__
            raise UserError(
                f"{type(self).__name__} grows sequences entity by entity; {name} (and a compiled step) is for BestOfN"
            )
        if self.shared >= generator.entities.count:
            raise UserError(
                f"shared is {self.shared}; a sequence has {generator.entities.count} entities"
            )

    def prior(self, task: Task) -> Prior:
        return task.generator_prior(self.unconditional)

    def shown(self, prior: Prior, pool: Pool, step: int) -> Callable[[Tensor], Pool] | None:
        """What is decoded in place of candidates `index` of a step; None: the candidates."""
        return None

    @torch.no_grad()
    def __call__(self, task: Task, results: int = 1, progress: Progress | None = None) -> Found:
        progress = progress or NothingKept()
        prior = self.prior(task)
        count = prior.entities.count
        decoder = task.decoder_of(prior.entities)
        judge = Judge(self.verifier, task.subject, decoder, self.batch_size)
        how = Branching(self.sample, self.replacement, self.branch)
        beams = prior.begin(task.given, task.known)
        if self.shared > beams.known:
            beams = prior.extend(beams, self.shared, 1, how)
            beams = beams.select(torch.arange(len(beams)))
        lengths = self.schedule.lengths(count, beams.known)
        steps: list[SearchStep] = []
        pool = beams
        best = torch.arange(len(beams))
        scores = torch.zeros(len(beams))
        calls = 0
        for step, length in enumerate(lengths):
            pool = prior.extend(beams, length, self.candidates_of(len(beams)), how)
            if self.dedup:
                pool = pool.without_copies(prior.entities)
            choices = progress.recall(step, pool.tokens)
            if choices is None:
                before = judge.calls
                all_scores = judge.scores(pool, self.shown(prior, pool, step), length)
                first = ranked(all_scores, max(self.width, results))
                choices = Choices(
                    tuple(first.tolist()),
                    tuple(all_scores[first].tolist()),
                    judge.calls - before,
                )
                progress.record(step, pool.tokens, choices)
            calls += choices.calls
            best = torch.tensor(choices.best)
            scores = torch.tensor(choices.scores, dtype=torch.float64)
            beams = pool.select(best[: self.width])
            steps.append(SearchStep(length, beams.tokens, scores, choices.calls))
        judge.calls = calls
        top = pool.select(best[:results])
        if top.known < count and self.complete:
            return self._completed(prior, judge, beams, top, results, steps)
        complete = self.shown(prior, top, len(lengths))
        shown = top if complete is None else complete(torch.arange(len(top)))
        images = decoder(shown.tokens, shown.known)
        return Found(
            tokens=beams.tokens,
            shown=top.tokens,
            images=images,
            scores=scores[:results],
            known=top.known,
            calls=calls,
            steps=tuple(steps),
        )

    def candidates_of(self, beams: int) -> int:
        """Candidates of each of so many beams."""
        if self.scale_first_step and beams < self.width:
            return self.candidates * (self.width // beams)
        return self.candidates

    def _completed(
        self,
        prior: Prior,
        judge: Judge,
        beams: Pool,
        top: Pool,
        results: int,
        steps: list[SearchStep],
    ) -> Found:
        """Sequences finished with the likeliest tokens, and scored again."""
        count = prior.entities.count
        start = top if self.exact_official or len(top) > len(beams) else beams
        whole = prior.extend(start, count, 1, LIKELIEST)
        scores = judge.scores(whole, length=None if self.exact_official else count)
        best = torch.arange(len(whole)) if self.exact_official else ranked(scores, len(whole))
        finished = whole.tokens[best.to(whole.tokens.device)]
        shown = finished[:results]
        steps.append(SearchStep(count, finished, scores[best], len(whole)))
        return Found(
            tokens=finished,
            shown=shown,
            images=judge.decoder(shown, count),
            scores=scores[best][:results],
            known=count,
            calls=judge.calls,
            steps=tuple(steps),
        )


@dataclass(frozen=True)
class Lookahead(Beam):
    """Beam search whose candidates are first continued with the likeliest `ahead` entities (-1: to the end) and
    judged by the images of that; what is kept is not continued. From step `until` on it is a beam search
    (-1: never).
    """

    ahead: int = -1
    until: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("ahead of Lookahead", self.ahead, least=-1)
        check_whole("until of Lookahead", self.until, least=-1)

    def shown(self, prior: Prior, pool: Pool, step: int) -> Callable[[Tensor], Pool] | None:
        left = prior.entities.count - pool.known
        ahead = left if self.ahead < 0 else min(self.ahead, left)
        if ahead == 0 or 0 <= self.until <= step:
            return None
        return lambda index: prior.extend(pool.select(index), pool.known + ahead, 1, LIKELIEST)


@dataclass(frozen=True)
class ARFree(Beam):
    """Search without a generator: every new token is drawn uniformly from the vocabulary, and the verifier
    alone decides (for ordered tokens). Needs a verifier that reads images.
    """

    candidates: int = 200
    width: int = 3
    schedule: SearchSchedule = Even(steps=4)  # noqa: RUF009
    complete: bool = False

    def check(self, generator: Generator, sampling: Sampling) -> None:
        super().check(generator, sampling)
        vocabulary_sizes(generator.layout)
        if self.verifier.needs_likelihood:
            raise UserError(
                "ARFree draws tokens uniformly, without a likelihood; take another verifier"
            )
        if self.complete:
            raise UserError("ARFree has no likeliest tokens to finish with: leave complete out")

    def prior(self, task: Task) -> Prior:
        if task.prior is not None:
            return task.prior
        return UniformPrior(task.generator.layout, task.generator.entities, task.noise())
