"""Guidance: classifier-free guidance and its schedules over entities.

g = u + w (c - u) (arXiv 2207.12598 in LlamaGen's convention: w = 1 is the conditional prediction alone). A schedule
gives w for entity n of N; the generator places the one call to `Guidance.merge` where its paper applies guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.entities import Entities

Schedule = Callable[[Tensor, Entities], Tensor]
"""Entity numbers [B, T] (may run past the end) to scales [B, T]."""


def _progress(entity: Tensor, entities: Entities, reach_end: bool = True) -> Tensor:
    """n / (N - 1), 1 where there is a single entity; without `reach_end` n / N, which stays below 1."""
    if not reach_end:
        return entity.clamp(max=entities.count - 1) / entities.count
    if entities.count == 1:
        return torch.ones(entity.shape)
    return entity.clamp(max=entities.count - 1) / (entities.count - 1)


@dataclass(frozen=True)
class Constant:
    """w at every entity."""

    scale: float

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return torch.full(entity.shape, float(self.scale))


@dataclass(frozen=True)
class Linear:
    """From `start` at the first entity to w at the last (xAR, VAR), or short of it (MaskGIT: `reach_end` False)."""

    scale: float
    start: float = 1.0
    reach_end: bool = True

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return self.start + (self.scale - self.start) * _progress(entity, entities, self.reach_end)


@dataclass(frozen=True)
class Cosine:
    """1 + (w - 1) (1 - cos(pi r)) / 2 over progress r."""

    scale: float

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return PowerCosine(self.scale, 1.0)(entity, entities)


@dataclass(frozen=True)
class PowerCosine:
    """1 + (w - 1) (1 - cos(pi r^power)) / 2 over progress r (VA-pi's fork of LlamaGen).

    RAR (arXiv 2411.00776) and MaskGIT count r = n / N, which stays below 1: `reach_end` False.
    """

    scale: float
    power: float = 3.0
    reach_end: bool = True

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = _progress(entity, entities, self.reach_end) ** self.power
        return 1 + (self.scale - 1) * (1 - torch.cos(torch.pi * progress)) / 2


@dataclass(frozen=True)
class HalfLinear:
    """1 + (w - 1) min(1, 2r) over progress r: linear up to the middle, w from there on (Token-Shuffle's default)."""

    scale: float

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return 1 + (self.scale - 1) * (2 * _progress(entity, entities)).clamp(max=1)


@dataclass(frozen=True)
class HalfCosine:
    """1 + (w - 1) (1 - cos(pi min(1, 2r))) / 2 over progress r (Token-Shuffle, arXiv 2504.17789)."""

    scale: float

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = (2 * _progress(entity, entities)).clamp(max=1)
        return 1 + (self.scale - 1) * (1 - torch.cos(torch.pi * progress)) / 2


@dataclass(frozen=True)
class Step:
    """`before` (1: none) until entity `first`, w from there on (HAR: from a quarter of the steps on)."""

    scale: float
    first: int
    before: float = 1.0

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return torch.where(entity >= self.first, float(self.scale), self.before)


@dataclass(frozen=True)
class LateStep:
    """w at the first entity and where progress n / (N - 1) has reached `start`, 1 between them (GigaTok, ReToK).

    `between` is the scale in between; the official code has 1.0001 there.
    """

    scale: float
    start: float = 0.18
    between: float = 1.0

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        full = (entity == 0) | (_progress(entity, entities) >= self.start)
        return torch.where(full, float(self.scale), float(self.between))


@dataclass(frozen=True)
class LateLinear:
    """w at the first entity, behind it `start` + (w - 1) r over progress r = n / (N - 1) (GigaTok, ReToK).

    The official code has 1.0001 for `start`. With `falling` it is 1 - r in place of r.
    """

    scale: float
    start: float = 1.0
    falling: bool = False

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = _progress(entity, entities)
        share = 1 - progress if self.falling else progress
        return torch.where(entity == 0, float(self.scale), self.start + (self.scale - 1) * share)


@dataclass(frozen=True)
class Interval:
    """w for entities in [first, last], 1 elsewhere (arXiv 2404.07724; LlamaGen's cfg_interval m is last = m + 1)."""

    scale: float
    first: int = 0
    last: int | None = None

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        inside = (entity >= self.first) & (entity <= (entities.count if self.last is None else self.last))
        return torch.where(inside, float(self.scale), 1.0)


@dataclass(frozen=True)
class Revealed:
    """1 + (w - 1) k / N for k of N tokens known behind the entity, one less behind the last (MAR, arXiv 2406.11838)."""

    scale: float

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        known = entities.ends[entity.clamp(max=entities.count - 1) + 1].clamp(max=entities.length - 1)
        return 1 + (self.scale - 1) * known / entities.length


SCHEDULES: dict[str, type] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "power_cosine": PowerCosine,
    "half_linear": HalfLinear,
    "half_cosine": HalfCosine,
    "step": Step,
    "late_step": LateStep,
    "late_linear": LateLinear,
    "interval": Interval,
    "revealed": Revealed,
}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; without a schedule there are no null rows at all."""

    schedule: Schedule | None = None

    @property
    def branches(self) -> int:
        """Rows an image: 1, or 2 with a conditional and a null row."""
        return 1 if self.schedule is None else 2

    def merge(self, x: Tensor, entity: Tensor, entities: Entities) -> Tensor:
        """Predictions [R, T, ...] of all branches (conditional rows first) to guided ones [B, T, ...].

        `entity` [B, T] are the entity numbers. Exactly the conditional prediction where the scale is 1.
        """
        if self.schedule is None:
            return x
        conditional, null = x.chunk(2)
        scale = self.schedule(entity, entities).to(x.device, torch.float32)
        scale = scale.view(*scale.shape, *(1,) * (x.ndim - scale.ndim))
        return torch.where(scale == 1, conditional, null + scale.to(x.dtype) * (conditional - null))


NO_GUIDANCE = Guidance()


@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance as a user writes it: scale, name of a schedule, its options (`power`, `first`, `last`, `start`)."""

    scale: float = 1.0
    schedule: str = "constant"
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> Guidance:
        """The guidance; scale 1 with a constant schedule means none. Raises UserError for unknown names."""
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance schedule {self.schedule!r} does not exist; there are {', '.join(SCHEDULES)}")
        if self.scale == 1.0 and self.options.get("start", 1.0) == 1.0:
            return NO_GUIDANCE
        try:
            return Guidance(SCHEDULES[self.schedule](self.scale, **self.options))
        except TypeError as error:
            raise UserError(f"guidance schedule {self.schedule!r}: {error}") from error

    def describe(self) -> dict[str, Any]:
        return {"guidance_scale": self.scale, "guidance_schedule": self.schedule, **self.options}
