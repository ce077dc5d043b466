"""Verifiers: what scores the candidates of a search; higher is better.

A user chooses one by its class: `--search.verifier Clip --search.verifier.source FOLDER`. A verifier measures
candidates in chunks; scores are made of all measurements of a step at once, so that they do not depend on the
chunks. Networks that select samples may not judge them: an evaluation network is refused here, and the record
of the samples names each network, which `evaluate.py` then refuses.

Shapes: n candidates, v measurements of each.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.networks.facts import UsedNetwork
from tessellar.protocol.ranges import check_list, check_number


@dataclass(frozen=True)
class Subject:
    """What images should show: a class by id and name (empty where it is not known), or a prompt; and a
    `reference` [3, H, W] in [-1, 1] to be like, where there is one.
    """

    label: int | None = None
    name: str = ""
    prompt: str = ""
    reference: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """What a verifier reads: images [n, 3, H, W] in about [-1, 1] (None unless it needs them), the subject,
    log-probabilities [n] of all tokens and of those of the last step (None without a likelihood), and how
    many tokens stand (None where all do from the start).
    """

    images: Tensor | None
    subject: Subject
    log_prob: Tensor | None = None
    last: Tensor | None = None
    length: int | None = None


@dataclass(frozen=True)
class Verifier(ABC):
    """Scores candidates of one prompt."""

    needs_images: ClassVar[bool] = True
    needs_likelihood: ClassVar[bool] = False

    @abstractmethod
    def measure(self, candidates: Candidates) -> Tensor:
        """Measurements [n, v], on the CPU; each depends on its own candidate alone."""

    def scores(self, measured: Tensor) -> Tensor:
        """Scores [n] of all candidates of a step, from their measurements [n, v]."""
        return measured[:, 0]

    @abstractmethod
    def check(self, subject: Subject) -> None:
        """Raise UserError, before anything is drawn, for a subject that cannot be scored."""

    def networks(self) -> tuple[UsedNetwork, ...]:
        """The networks that select, for the record of the samples."""
        return ()


@dataclass(frozen=True)
class Likelihood(Verifier):
    """The generator's own log-probability of all tokens so far, guidance included.

    `exact_official`: that of the last step's tokens alone, divided by the whole length.
    """

    exact_official: bool = False

    needs_images: ClassVar[bool] = False
    needs_likelihood: ClassVar[bool] = True

    def check(self, subject: Subject) -> None:
        """Any subject can be scored."""

    def measure(self, candidates: Candidates) -> Tensor:
        log_prob = candidates.last if self.exact_official else candidates.log_prob
        if log_prob is None:
            raise UserError(
                "the Likelihood verifier needs a generator with a likelihood; take another verifier"
            )
        if self.exact_official and candidates.length is not None:
            log_prob = log_prob / candidates.length
        return log_prob[:, None].cpu()


@dataclass(frozen=True)
class Ensemble(Verifier):
    """Several verifiers as one, with a weight each (default 1; 0 leaves one out).

    By `rank`: 1 - sum w r / sum w (n - 1), r = 0 for the best; equal scores share a rank's order by candidate.
    `weighted`: the weighted sum of scores brought to [0, 1] (0 where all are equal). `exact_official`: with a
    weight of 0 the others meet the wrong weights, as in the official code.
    """

    verifiers: list[Verifier]
    weights: tuple[float, ...] = ()
    by: Literal["rank", "weighted"] = "rank"
    exact_official: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_list("weights of the ensemble", self.weights))
        for weight in self.weights:
            check_number("weight of the ensemble", weight, least=0)
        if not self.verifiers:
            raise UserError("an ensemble needs at least one verifier")
        if self.weights and len(self.weights) != len(self.verifiers):
            raise UserError(
                f"an ensemble of {len(self.verifiers)} verifiers has {len(self.weights)} weights"
            )
        if not any(self._weights):
            raise UserError("at least one weight of the ensemble must be above 0")

    @property
    def _weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.verifiers)

    @property
    def _members(self) -> list[tuple[Verifier, float]]:
        """The verifiers that count, with their weights."""
        asked = [v for v, weight in zip(self.verifiers, self._weights, strict=True) if weight > 0]
        if self.exact_official:
            return list(zip(asked, self._weights, strict=False))
        return list(zip(asked, filter(None, self._weights), strict=True))

    @property
    def needs_images(self) -> bool:  # type: ignore[override]
        return any(verifier.needs_images for verifier, _ in self._members)

    @property
    def needs_likelihood(self) -> bool:  # type: ignore[override]
        return any(verifier.needs_likelihood for verifier, _ in self._members)

    def check(self, subject: Subject) -> None:
        for verifier, _ in self._members:
            verifier.check(subject)

    def networks(self) -> tuple[UsedNetwork, ...]:
        found: list[UsedNetwork] = []
        for verifier, _ in self._members:
            found += verifier.networks()
        return tuple(found)

    def measure(self, candidates: Candidates) -> Tensor:
        measured = [verifier.measure(candidates).double() for verifier, _ in self._members]
        return torch.cat(measured, 1)

    def scores(self, measured: Tensor) -> Tensor:
        total = torch.zeros(len(measured), dtype=torch.float64)
        weights = 0.0
        start = 0
        for verifier, weight in self._members:
            # Every member has as many columns as it measures.
            width = columns_of(verifier)
            scores = verifier.scores(measured[:, start : start + width]).double()
            start += width
            weights += weight
            total += weight * (ranks(scores) if self.by == "rank" else unit_range(scores))
        if self.by == "weighted":
            return total
        return 1 - total / (weights * max(len(measured) - 1, 1))


def columns_of(verifier: Verifier) -> int:
    """How many measurements v a verifier makes of a candidate."""
    if isinstance(verifier, Ensemble):
        return sum(columns_of(member) for member, _ in verifier._members)
    return 1


def ranks(scores: Tensor) -> Tensor:
    """Ranks [n], 0 for the highest score, equal ones by their index."""
    order = scores.argsort(descending=True, stable=True)
    return order.argsort().double()


def unit_range(scores: Tensor) -> Tensor:
    """Scores [n] from 0, the lowest, to 1, the highest; 0 where they differ by less than 1e-8."""
    lowest = scores.min()
    span = scores.max() - lowest
    return torch.zeros_like(scores) if span < 1e-8 else (scores - lowest) / span
