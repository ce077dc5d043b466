"""Ancestral diffusion sampling of an entity: from noise to data in respaced reverse steps (MAR, arXiv 2406.11838)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from tessellar.diffusion import TRAINING_STEPS, Diffusion, full_process, kept_steps, respaced
from tessellar.errors import UserError
from tessellar.models.heads.implicit import Model
from tessellar.sampling.noise import Noise


@dataclass(frozen=True)
class AncestralDiffusion:
    """`steps` evaluations of the head for an entity; `temperature` scales the noise of each step, not the start.

    `last_steps` anneals the steps linearly to that number at the last entity (DiSA, arXiv 2505.20297).
    """

    steps: int = 100
    temperature: float = 1.0
    last_steps: int | None = None

    def __post_init__(self) -> None:
        least = min(self.steps, self.steps if self.last_steps is None else self.last_steps)
        if least < 2 or self.steps > TRAINING_STEPS or self.temperature < 0:
            raise UserError(f"{self}: give 2 to {TRAINING_STEPS} steps and a temperature of at least 0")

    def steps_of(self, entity: int, count: int) -> int:
        """Evaluations for entity number `entity` of `count`."""
        if self.last_steps is None or count == 1:
            return self.steps
        return round(self.steps + (self.last_steps - self.steps) * entity / (count - 1))

    def integrate(self, model: Model, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1) -> Tensor:
        """Draw [B, *shape]; `model(x, t)` gives predicted noise and variance share in 2 C channels."""
        return ancestral_diffusion(model, _process(self.steps_of(entity, count)), shape, noise, self.temperature)

    def describe(self) -> dict[str, Any]:
        annealed = {} if self.last_steps is None else {"diffusion_last_steps": self.last_steps}
        return {"diffusion_steps": self.steps, "diffusion_temperature": self.temperature, **annealed}


@lru_cache
def _process(steps: int) -> Diffusion:
    return respaced(full_process(), kept_steps(steps))


def ancestral_diffusion(
    model: Model, process: Diffusion, shape: tuple[int, int], noise: Noise, temperature: float
) -> Tensor:
    """Reverse steps of a process; the last one adds no noise."""
    x = noise.normal(*shape)
    for t in reversed(range(len(process.steps))):
        eps, v = model(x, x.new_tensor(process.steps[t])).chunk(2, -1)
        x = process.reverse(x, t, eps, v, noise.normal(*shape) if t else None, temperature)
    return x
