"""Implicit: tokens whose law is only known through a network that a solver integrates (flow matching, diffusion)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tessellar.models.heads.distribution import Distribution
from tessellar.sampling.noise import Noise

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
