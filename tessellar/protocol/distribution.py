"""Distributions: what a generator predicts of an entity, guidance included, and how it is drawn.

`Logits`: tokens that are independent given what came before; speculative decoding and search need this kind.
`Implicit`: known only through a network that a solver integrates (flow matching, diffusion).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.protocol.choice import Choice
from tessellar.protocol.noise import Noise


class Distribution(ABC):
    """Prediction of T tokens of each image, guidance included."""

    @abstractmethod
    def sample(self, sampler: Any, noise: Noise) -> Tensor:
        """Tokens [B, T], [B, T, F] or [B, T, C]; `sampler` is the kind that the head needs (`Choice` for logits)."""


Model = Callable[[Tensor, Tensor], Tensor]


"""(x [B, T, C], time, a scalar tensor) to what the solver integrates, guidance inside."""


class Solver(Protocol):
    """What draws from an Implicit: `Flow`, or any sampler with this method."""

    def integrate(self, model: Model, shape: tuple[int, int], noise: Noise, entity: int, count: int) -> Tensor:
        """[B, T, C] of `shape` (T, C), for entity number `entity` of `count`: solvers may spend less on later ones."""
        ...


@dataclass(frozen=True)
class Implicit(Distribution):
    """One entity of T tokens with C channels; `entity` of `count` says how far decoding is."""

    model: Model
    shape: tuple[int, int]
    entity: int = 0
    count: int = 1

    def sample(self, sampler: Solver, noise: Noise) -> Tensor:
        return sampler.integrate(self.model, self.shape, noise, self.entity, self.count)


@dataclass(frozen=True)
class Logits(Distribution):
    """Categorical logits [B, T, V], float32; a vocabulary smaller than V is padded with -inf."""

    logits: Tensor

    def sample(self, sampler: Choice, noise: Noise) -> Tensor:
        return sampler.draw(self.logits, noise)

    def cross_entropy(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of `tokens` [B, T]; `weight` [B] weighs (or drops) whole samples."""
        loss = F.cross_entropy(self.logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        if weight is None:
            return loss.mean()
        return (loss * weight[:, None]).sum() / (weight.sum() * tokens.shape[1]).clamp(min=torch.finfo(loss.dtype).eps)
