"""TokenUnify's mixture of objectives over one sequence of tokens (arXiv 2405.16847).

Random-token prediction hides some places and asks for them, next-token prediction asks for the one
behind a prefix, next-all-token prediction for all of them behind it. What is hidden, what is put in
its place and how the three are weighed over a run are functions here, for tokens of any kind
(indices, vectors, patches of pixels) and any backbone.

Shapes: B samples, N places.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.protocol.arguments import in_ranges


def hidden_at(places: Tensor, length: int) -> Tensor:
    """Which of N places [B, N] are among `places` [B, n]."""
    hidden = torch.zeros(len(places), length, dtype=torch.bool, device=places.device)
    return hidden.scatter(1, places, True)


def random_places(batch: int, length: int, ratio: float) -> Tensor:
    """floor(ratio N) different places [B, n] of each sample, drawn uniformly."""
    return torch.rand(batch, length).argsort(1)[:, : int(ratio * length)]


def hidden_behind(counts: Tensor, length: int) -> Tensor:
    """Which of N places [B, N] lie behind the first `counts` [B]."""
    return torch.arange(length, device=counts.device) >= counts[:, None]


def filled(tokens: Tensor, hidden: Tensor, fill: Tensor) -> Tensor:
    """Tokens [B, N, ...] with `fill` (the same shape, or one value) at the hidden places [B, N]."""
    chosen = hidden.reshape(*hidden.shape, *[1] * (tokens.ndim - 2))
    return torch.where(chosen, fill.to(tokens.dtype), tokens)


class Weights(NamedTuple):
    """How much each objective counts now; one that counts 0 is not computed."""

    random: float
    next: float
    next_all: float


class MixtureSchedule(ABC):
    """How the objectives share a run."""

    @abstractmethod
    def weights(self, epoch: int, progress: float) -> Weights:
        """Of epoch number `epoch`, at the share `progress` of the run in [0, 1]."""


@in_ranges
@dataclass(frozen=True)
class Joint(MixtureSchedule):
    """All at once, weighed: the official `auto_mode 1` has next and next-all at 1."""

    random_weight: float = 0.0
    next_weight: float = 1.0
    next_all_weight: float = 1.0

    def weights(self, epoch: int, progress: float) -> Weights:
        return Weights(self.random_weight, self.next_weight, self.next_all_weight)


@in_ranges
@dataclass(frozen=True)
class Alternating(MixtureSchedule):
    """Next-token for `every` epochs, next-all for as many, and so on: the official `auto_mode 0`."""

    every: int = 100

    def weights(self, epoch: int, progress: float) -> Weights:
        is_next = epoch // self.every % 2 == 0
        return Weights(0.0, float(is_next), float(not is_next))


@in_ranges
@dataclass(frozen=True)
class Stages(MixtureSchedule):
    """Random tokens for the first `share` of the run, then next and next-all together: the paper's
    two runs, one after the other, in one.
    """

    share: float = 0.5

    def weights(self, epoch: int, progress: float) -> Weights:
        if progress < self.share:
            return Weights(1.0, 0.0, 0.0)
        return Weights(0.0, 1.0, 1.0)
