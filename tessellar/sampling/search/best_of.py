"""Best-of-N: whole sequences are drawn, each with a seed of its own, and the best one is kept.

Any generator and any decoding algorithm. The sequences of N are the first of those of more, so a larger N never
scores worse, and N = 1 is plain sampling.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import take
from tessellar.protocol.generator import Generator
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_whole
from tessellar.randomness import derive
from tessellar.sampling.decode import EntityByEntity
from tessellar.sampling.search.priors import Pool
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


def candidate_seed(seed: int, number: int) -> int:
    """Seed of candidate `number` of an image: the first one has the image's own."""
    return seed if number == 0 else derive(seed, number)


@dataclass(frozen=True)
class BestOfN(Search):
    """The best of `count` whole images, drawn by the settings of sampling; N verifier calls.

    `exact_official`: an ensemble scores each batch by itself, so its ranks depend on `batch_size`.
    """

    verifier: Verifier = Likelihood()
    count: int = 16
    exact_official: bool = False

    uses_algorithm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("count of BestOfN", self.count, least=1, most=MOST_CANDIDATES)
        check_whole("batch_size of the search", self.batch_size, least=1, most=MOST_CANDIDATES)

    def check(self, generator: Generator, sampling: Sampling) -> None:
        super().check(generator, sampling)
        if self.verifier.needs_likelihood and not sampling.algorithm.exact:
            name = type(sampling.algorithm).__name__
            raise UserError(
                f"sequences drawn by {name} have no likelihood that could be scored; take another verifier"
            )

    @torch.no_grad()
    def __call__(self, task: Task, results: int = 1, progress: Progress | None = None) -> Found:
        progress = progress or NothingKept()
        count = task.generator.entities.count
        parts = []
        log_probs = []
        for numbers in torch.arange(self.count).split(self.batch_size):
            seeds = [candidate_seed(task.seed, number) for number in numbers.tolist()]
            if task.sampler is not None:
                tokens, log_prob = task.sampler(seeds)
            else:
                tokens, log_prob = drawn(task, seeds, self.verifier.needs_likelihood)
            parts.append(tokens)
            log_probs.append(log_prob)
        known = [log_prob for log_prob in log_probs if log_prob is not None]
        log_prob = torch.cat(known).double().cpu() if known else None
        pool = Pool(
            torch.cat(parts), count, torch.zeros(self.count), log_prob=log_prob, last=log_prob
        )

        def decoded(tokens: Tensor, known: int) -> Tensor:
            """Each image with the noise that plain sampling would give it."""
            return task.tokenizer.decode(tokens)

        decoder = task.decoder or decoded
        judge = Judge(self.verifier, task.subject, decoder, self.batch_size)
        choices = progress.recall(0, pool.tokens)
        if choices is None:
            scores = self._scores(judge, pool)
            best = ranked(scores, max(results, 1))
            chosen = scores[best]
            choices = Choices(tuple(best.tolist()), tuple(chosen.tolist()), judge.calls)
            progress.record(0, pool.tokens, choices)
        index = torch.tensor(choices.best).to(pool.tokens.device)
        tokens = pool.tokens[index]
        scores = torch.tensor(choices.scores, dtype=torch.float64)
        return Found(
            tokens=tokens,
            shown=tokens,
            images=decoder(tokens, count),
            scores=scores,
            known=count,
            calls=choices.calls,
            steps=(SearchStep(count, tokens, scores, choices.calls),),
        )

    def _scores(self, judge: Judge, pool: Pool) -> Tensor:
        if not self.exact_official:
            return judge.scores(pool)
        batches = torch.arange(self.count).split(self.batch_size)
        return torch.cat([judge.scores(pool.select(index)) for index in batches])


def drawn(task: Task, seeds: list[int], with_likelihood: bool) -> tuple[Tensor, Tensor | None]:
    """Whole sequences of some seeds, and their log-probabilities where they are wanted."""
    rows = torch.zeros(len(seeds), dtype=torch.int64)
    condition = task.condition.to(task.device).select(rows.to(task.device))
    with task.rounding():
        tokens = task.sampling.tokens(task.generator, condition, seeds, task.recorder)
        log_prob = likelihood_of(task, condition, seeds, tokens) if with_likelihood else None
    return tokens, log_prob


def likelihood_of(
    task: Task, condition: Condition, seeds: list[int], tokens: Tensor
) -> Tensor | None:
    """Log-probabilities [n] of whole sequences that an exact algorithm drew with these seeds."""
    # The order is drawn first, so the same seeds give the order that the sequences were drawn in.
    algorithm = task.sampling.algorithm
    noise = Noise(seeds, task.device)
    if isinstance(algorithm, EntityByEntity):
        entities = algorithm.plan(task.generator, noise)
    else:
        entities = task.generator.plan(noise)
    state = task.generator.start(condition, task.sampling.guidance.guidance(), entities)
    scored = task.generator.predict(state, tokens, count=entities.count)
    values = take(tokens, entities.order.expand(len(tokens), -1))
    if not isinstance(scored, Logits):
        log_prob = scored.log_prob(values)
        return None if log_prob is None else log_prob.sum(1)
    choice: Choice = task.sampling.choice
    probs = choice.probs(scored.logits).gather(-1, values[..., None])[..., 0]
    return probs.log().sum(1)
