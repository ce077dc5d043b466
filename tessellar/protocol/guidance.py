"""Guidance: classifier-free guidance and its schedules over entities.

g = u + w (c - u) (arXiv 2207.12598 in LlamaGen's convention: w = 1 is the conditional prediction
alone). A schedule gives w for entity n of N; the generator places the one call to `Guidance.merge`
where its paper applies guidance. A user chooses a schedule by its class: `--guidance PowerCosine
--guidance.scale 16 --guidance.power 2.75`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.protocol.condition import Condition, cat
from tessellar.protocol.entities import Entities
from tessellar.protocol.ranges import check_list, check_number, check_whole

Schedule = Callable[[Tensor, Entities], Tensor]
"""Entity numbers [B, T] (may run past the end) to scales [B, T]."""


def _progress(entity: Tensor, entities: Entities, reach_end: bool = True) -> Tensor:
    """n / (N - 1), 1 where there is a single entity; without `reach_end` n / N, which stays below
    1.
    """
    if not reach_end:
        return entity.clamp(max=entities.count - 1) / entities.count
    if entities.count == 1:
        return torch.ones(entity.shape, device=entity.device)
    return entity.clamp(max=entities.count - 1) / (entities.count - 1)


LARGEST = 1e6  # beyond it, weighted logits and velocities leave the range of float32


@dataclass(frozen=True)
class Blend:
    """A second condition of the same images [B], whose prediction has this share of the conditional one.

    Of logits that is the geometric mean of both laws: p(x | a)^(1 - share) p(x | b)^share, normalised.
    """

    other: Condition
    share: float


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; without a schedule there are no null rows, without a blend no second
    conditional ones.
    """

    schedule: Schedule | None = None
    blend: Blend | None = None

    @property
    def branches(self) -> int:
        """Rows an image: a conditional one, one of the blend, a null row."""
        return 1 + (self.blend is not None) + (self.schedule is not None)

    def conditions(self, condition: Condition, null: Callable[[Condition], Condition]) -> Condition:
        """R rows of all branches; `null` makes the unconditional counterpart of rows."""
        rows = [condition]
        if self.blend is not None:
            rows.append(self.blend.other)
        if self.schedule is not None:
            rows.append(null(condition))
        return condition if len(rows) == 1 else cat(rows)

    def merge(self, x: Tensor, entity: Tensor, entities: Entities, factor: int = 0) -> Tensor:
        """Predictions [R, T, ...] of all branches (conditional rows first) to guided ones [B, T,
        ...].

        `entity` [B, T] are the entity numbers, `factor` the sub-token that is predicted. Exactly
        the conditional prediction where the scale is 1.
        """
        if self.branches == 1:
            return x
        parts = x.chunk(self.branches)
        conditional = parts[0]
        if self.blend is not None:
            conditional = (1 - self.blend.share) * conditional + self.blend.share * parts[1]
        if self.schedule is None:
            return conditional
        null = parts[-1]
        schedule = self.schedule
        if isinstance(schedule, PerSubToken):
            schedule = schedule.of_factor(factor)
        scale = schedule(entity, entities).to(x.device, torch.float32)
        scale = scale.view(*scale.shape, *(1,) * (x.ndim - scale.ndim))
        guided = null + scale.to(x.dtype) * (conditional - null)
        if isinstance(schedule, Renormed):
            guided = no_longer(guided, conditional)
        return torch.where(scale == 1, conditional, guided)


NO_GUIDANCE = Guidance()


@dataclass(frozen=True)
class GuidanceSchedule(ABC):
    """The scale w of each entity."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("guidance scale", self.scale, least=-LARGEST, most=LARGEST)

    @abstractmethod
    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        """Scales [B, T] of entity numbers [B, T], which may run past the end."""

    @property
    def is_one(self) -> bool:
        """Whether w is 1 at every entity, which is no guidance."""
        return self.scale == 1

    def guidance(self) -> Guidance:
        """Guidance with this schedule; without null rows where w is 1 at every entity."""
        return NO_GUIDANCE if self.is_one else Guidance(self)


@dataclass(frozen=True)
class Constant(GuidanceSchedule):
    """w at every entity."""

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return torch.full(entity.shape, float(self.scale), device=entity.device)


@dataclass(frozen=True)
class Renormed(Constant):
    """w at every entity; a guided prediction is no longer than the conditional one, token by token
    (Ming-UniVision's channel renorm, arXiv 2510.06590).
    """


def no_longer(x: Tensor, reference: Tensor) -> Tensor:
    """x [..., C] where it is as long as `reference` at most, else scaled to that length."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    allowed = torch.linalg.vector_norm(reference, dim=-1, keepdim=True)
    # As published, the epsilon is outside the quotient; 0 / 0 is no bound.
    ratio = torch.nan_to_num(allowed / length, nan=1.0) + 1e-8
    return x * ratio.clamp(0, 1)


@dataclass(frozen=True)
class _FromStart(GuidanceSchedule):
    """A schedule that does not begin at w but at `start`."""

    start: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("guidance start", self.start, least=-LARGEST, most=LARGEST)

    @property
    def is_one(self) -> bool:
        return self.scale == 1 and self.start == 1


@dataclass(frozen=True)
class Linear(_FromStart):
    """From `start` at the first entity to w at the last (xAR, VAR), or short of it (MaskGIT:
    `reach_end` False).
    """

    reach_end: bool = True

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return self.start + (self.scale - self.start) * _progress(entity, entities, self.reach_end)


@dataclass(frozen=True)
class Cosine(GuidanceSchedule):
    """1 + (w - 1) (1 - cos(pi r)) / 2 over progress r."""

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return PowerCosine(self.scale, 1.0)(entity, entities)


@dataclass(frozen=True)
class PowerCosine(GuidanceSchedule):
    """1 + (w - 1) (1 - cos(pi r^power)) / 2 over progress r (VA-pi's fork of LlamaGen).

    RAR (arXiv 2411.00776) and MaskGIT count r = n / N, which stays below 1: `reach_end` False.
    """

    power: float = 3.0
    reach_end: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("guidance power", self.power, least=0, most=LARGEST)

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = _progress(entity, entities, self.reach_end) ** self.power
        return 1 + (self.scale - 1) * (1 - torch.cos(torch.pi * progress)) / 2


@dataclass(frozen=True)
class HalfLinear(GuidanceSchedule):
    """1 + (w - 1) min(1, 2r) over progress r: linear up to the middle, w from there on
    (Token-Shuffle's default).
    """

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return 1 + (self.scale - 1) * (2 * _progress(entity, entities)).clamp(max=1)


@dataclass(frozen=True)
class HalfCosine(GuidanceSchedule):
    """1 + (w - 1) (1 - cos(pi min(1, 2r))) / 2 over progress r (Token-Shuffle, arXiv 2504.17789)."""

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = (2 * _progress(entity, entities)).clamp(max=1)
        return 1 + (self.scale - 1) * (1 - torch.cos(torch.pi * progress)) / 2


@dataclass(frozen=True)
class Step(GuidanceSchedule):
    """`before` (1: none) until entity `first`, w from there on (HAR: from a quarter of the steps
    on).
    """

    first: int = 0
    before: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("guidance first", self.first, least=0)
        check_number("guidance before", self.before, least=-LARGEST, most=LARGEST)

    @property
    def is_one(self) -> bool:
        return self.scale == 1 and (self.before == 1 or self.first == 0)

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return torch.where(entity >= self.first, float(self.scale), self.before)


@dataclass(frozen=True)
class LateStep(GuidanceSchedule):
    """w at the first entity and where progress n / (N - 1) has reached `start`, 1 between them
    (GigaTok, ReToK).

    `between` is the scale in between; the official code has 1.0001 there.
    """

    start: float = 0.18
    between: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("guidance start", self.start, least=0, most=1)
        check_number("guidance between", self.between, least=-LARGEST, most=LARGEST)

    @property
    def is_one(self) -> bool:
        return self.scale == 1 and self.between == 1

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        full = (entity == 0) | (_progress(entity, entities) >= self.start)
        return torch.where(full, float(self.scale), float(self.between))


@dataclass(frozen=True)
class LateLinear(_FromStart):
    """w at the first entity, behind it `start` + (w - 1) r over progress r = n / (N - 1) (GigaTok,
    ReToK).

    The official code has 1.0001 for `start`. With `falling` it is 1 - r in place of r.
    """

    falling: bool = False

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        progress = _progress(entity, entities)
        share = 1 - progress if self.falling else progress
        return torch.where(entity == 0, float(self.scale), self.start + (self.scale - 1) * share)


@dataclass(frozen=True)
class Interval(GuidanceSchedule):
    """w for entities in [first, last], 1 elsewhere (arXiv 2404.07724; LlamaGen's cfg_interval m is
    last = m + 1).
    """

    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("guidance first", self.first, least=0)
        if self.last is not None:
            check_whole("guidance last", self.last, least=self.first)

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        inside = (entity >= self.first) & (
            entity <= (entities.count if self.last is None else self.last)
        )
        return torch.where(inside, float(self.scale), 1.0)


@dataclass(frozen=True)
class Revealed(GuidanceSchedule):
    """1 + (w - 1) k / N for k of N tokens known behind the entity, one less behind the last (MAR,
    arXiv 2406.11838).
    """

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        known = entities.ends[entity.clamp(max=entities.count - 1) + 1].clamp(
            max=entities.length - 1
        )
        return 1 + (self.scale - 1) * known / entities.length


@dataclass(frozen=True)
class PerSubToken(GuidanceSchedule):
    """w at every entity for the first sub-token of a token, `further` for those behind it, of which
    the last one goes on (Open-MAGVIT2, arXiv 2409.04410).
    """

    further: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "further", check_list("guidance further", self.further))
        for scale in self.further:
            check_number("guidance further", scale, least=-LARGEST, most=LARGEST)

    @property
    def is_one(self) -> bool:
        return self.scale == 1 and all(scale == 1 for scale in self.further)

    def of_factor(self, factor: int) -> Constant:
        """The schedule of sub-token `factor`."""
        if factor == 0 or not self.further:
            return Constant(self.scale)
        return Constant(self.further[min(factor, len(self.further)) - 1])

    def __call__(self, entity: Tensor, entities: Entities) -> Tensor:
        return self.of_factor(0)(entity, entities)
