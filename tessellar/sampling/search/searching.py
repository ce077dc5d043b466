"""What a search is given and what it finds; the judge that decodes and scores candidates.

Shapes: n candidates, r results, N tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.report import Recorder
from tessellar.sampling.search.priors import GeneratorPrior, Pool, Prior, StreamNoise
from tessellar.sampling.search.verifiers import Candidates, Subject, Verifier
from tessellar.sampling.settings import Sampling

MOST_CANDIDATES = 100_000  # of an image: their tokens and scores are held at once

Decoder = Callable[[Tensor, int], Tensor]
"""(token buffers [n, N, ...], how many entities stand) to images [n, 3, H, W]."""

Sampler = Callable[[list[int]], tuple[Tensor, Tensor | None]]
"""Seeds to whole sequences [n, N, ...] and their log-probabilities [n], where they are wanted and there are any."""


@dataclass(frozen=True)
class PartialDecoder:
    """Images of sequences of which the first entities stand.

    A prefix where the tokenizer decodes prefixes (ordered tokens, scales); else whole sequences with id 0 in
    the place of what is missing, as the official code does for grids. Where decoding draws noise all images
    take that of one `seed`, so that candidates differ by their tokens alone.
    """

    tokenizer: Tokenizer
    entities: Entities
    seed: int

    @torch.no_grad()
    def __call__(self, tokens: Tensor, known: int) -> Tensor:
        return self.tokenizer.decode_seeded(self.shown(tokens, known), [self.seed] * len(tokens))

    def shown(self, tokens: Tensor, known: int) -> Tensor:
        """What is decoded: the shortest prefix that holds the known tokens, or all, zeros where unknown."""
        layout = self.tokenizer.layout
        order = self.entities.order
        in_order = order.ndim == 1 and torch.equal(order, torch.arange(len(order)))
        if layout.min_prefix is None or not in_order:
            return tokens
        length = max(int(self.entities.ends[known]), layout.min_prefix)
        return tokens[:, :length]


@dataclass
class Task:
    """One image to search for: a generator with its condition of one row, the tokenizer, the subject.

    `given` [b, N, ...] are sequences whose first `known` entities stand before the search begins. Parts that
    others replace (replays, tests): `prior`, `decoder`, `sampler`.
    """

    generator: Generator
    tokenizer: Tokenizer
    condition: Condition
    sampling: Sampling
    seed: int
    subject: Subject = Subject()  # noqa: RUF009
    given: Tensor | None = None
    known: int = 0
    recorder: Recorder | None = None
    precision: str = "float32"
    prior: Prior | None = None
    decoder: Decoder | None = None
    sampler: Sampler | None = None

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def rounding(self) -> AbstractContextManager:
        """Around the generator: its precision. Images are decoded in float32."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def noise(self) -> StreamNoise:
        """The stream of this image."""
        return StreamNoise(self.seed, self.device)

    def generator_prior(self, unconditional: bool = False) -> Prior:
        """The generator as a prior; `unconditional`: under the null condition, without guidance."""
        if self.prior is not None:
            return self.prior
        guidance = self.sampling.guidance.guidance()
        condition = self.condition.to(self.device)
        if unconditional:
            guidance = NO_GUIDANCE
            condition = self.generator.null(condition)
        return GeneratorPrior(
            self.generator,
            condition,
            settings=self.sampling,
            noise=self.noise(),
            guidance=guidance,
            recorder=self.recorder,
            steps=getattr(self.sampling.algorithm, "steps", None),
            rounding=self.rounding,
        )

    def decoder_of(self, entities: Entities) -> Decoder:
        return self.decoder or PartialDecoder(self.tokenizer, entities, self.seed)


@dataclass(frozen=True)
class SearchStep:
    """A step of a search: the kept sequences [b, N, ...], best first, of `known` entities, and the scores of
    the best candidates [m], of which `calls` were scored.
    """

    known: int
    tokens: Tensor
    scores: Tensor
    calls: int


@dataclass(frozen=True)
class Found:
    """What a search found, best first: `tokens` [b, N, ...] of what was kept; of the best r candidates the
    sequences `shown` [r, N, ...], their images [r, 3, H, W] and scores [r].

    `known` entities stand; `calls` is the number of candidates that the verifier scored.
    """

    tokens: Tensor
    shown: Tensor
    images: Tensor
    scores: Tensor
    known: int
    calls: int
    steps: tuple[SearchStep, ...] = ()


class Progress(Protocol):
    """Remembers what a search chose, so that an interrupted one goes on (`journal.py`)."""

    def recall(self, step: int, tokens: Tensor) -> "Choices | None":
        """What was chosen among candidates `tokens` [n, N, ...] of a step; None where it is not known."""
        ...

    def record(self, step: int, tokens: Tensor, choices: "Choices") -> None:
        """Keep what was chosen at a step."""
        ...


@dataclass(frozen=True)
class Choices:
    """The best candidates of a step by number, best first, their scores, and how many were scored."""

    best: tuple[int, ...]
    scores: tuple[float, ...]
    calls: int


class NothingKept:
    """The progress of a search that cannot be resumed."""

    def recall(self, step: int, tokens: Tensor) -> Choices | None:
        return None

    def record(self, step: int, tokens: Tensor, choices: Choices) -> None:
        pass


@dataclass
class Judge:
    """Scores the candidates of one task; `calls` counts them. Candidates are decoded and measured in chunks
    of `batch_size`, and scored together.
    """

    verifier: Verifier
    subject: Subject
    decoder: Decoder
    batch_size: int
    calls: int = 0
    measured: list[Tensor] = field(default_factory=list)

    def scores(
        self, pool: Pool, shown: Callable[[Tensor], Pool] | None = None, length: int | None = None
    ) -> Tensor:
        """Scores [n] of a pool. `shown(index)` gives the sequences that are decoded in place of those
        candidates (look-ahead), `length` what counts as their length.
        """
        parts = []
        for index in torch.arange(len(pool)).split(self.batch_size):
            images = None
            if self.verifier.needs_images:
                seen = None if shown is None else shown(index)
                tokens = pool.tokens[index.to(pool.tokens.device)] if seen is None else seen.tokens
                images = self.decoder(tokens, pool.known if seen is None else seen.known)
            candidates = Candidates(
                images=images,
                subject=self.subject,
                log_prob=None if pool.log_prob is None else pool.log_prob[index],
                last=None if pool.last is None else pool.last[index],
                length=length,
            )
            parts.append(self.verifier.measure(candidates).cpu())
        self.calls += len(pool)
        scores = self.verifier.scores(torch.cat(parts))
        if bool(scores.isnan().any()):
            raise UserError(f"{type(self.verifier).__name__} scored a candidate as NaN")
        return scores


def ranked(scores: Tensor, count: int) -> Tensor:
    """Numbers of the best `count` candidates, best first, equal scores by number."""
    return scores.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class Search(ABC):
    """A search with its options; `batch_size` candidates are decoded and scored at once, which changes no
    result.
    """

    verifier: Verifier
    batch_size: int = 50

    #: Whether whole sequences are drawn by the decoding algorithm of the sampling settings.
    uses_algorithm: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, task: Task, results: int = 1, progress: Progress | None = None) -> Found:
        """The best sequences for a task, with images and scores of the best `results` candidates."""

    def check(self, generator: Generator, sampling: Sampling) -> None:
        """Raise UserError, before anything is drawn, for a generator or settings that do not fit."""
        if self.verifier.needs_likelihood and generator.layout.is_continuous:
            raise UserError(
                f"{type(generator).__name__} draws real numbers, which have no likelihood here: search with a "
                "verifier that looks at images (--search.verifier.help lists them)"
            )
