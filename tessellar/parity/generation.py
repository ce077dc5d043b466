"""What replays of several generators do alike: scores of given tokens, guidance of official
options, names of companions, rates of learning.

Shapes: B images, N tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.stand_ins import choice_of, logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, GuidanceSchedule, PowerCosine
from tessellar.schedules import Schedule

Schedules = Mapping[str, Callable[[float], GuidanceSchedule]]
"""Guidance schedules by their official names, each made of a scale."""


def beside(name: str, last: str) -> str:
    """The companion of an output: `run/tokens` beside `run/logits`."""
    return f"{name.rpartition('/')[0]}/{last}"


class Scorer(Protocol):
    """A generator that predicts all tokens in one pass."""

    def score(
        self, tokens: Tensor, condition: Condition, entities: Entities | None = None
    ) -> Distribution: ...


def scores_of(
    generator: Scorer, tokens: Tensor, condition: Condition, entities: Entities | None = None
) -> Logits:
    """Predictions of all tokens, each given its predecessors."""
    scores = generator.score(tokens, condition, entities)
    assert isinstance(scores, Logits), f"{type(scores).__name__} has no logits"
    return scores


@torch.no_grad()
def predicted(
    generator: Generator,
    tokens: Tensor,
    condition: Condition,
    count: int,
    entities: Entities | None = None,
) -> Tensor:
    """Logits [B, T, V] of the first `count` entities, of which one may lie past the end."""
    state = generator.start(condition, entities=entities)
    return logits_of(generator.predict(state, tokens, count=count))


def past_the_end(
    generator: Generator, tokens: Tensor, condition: Condition, entities: Entities | None = None
) -> Tensor:
    """Logits [B, N + 1, V] of all tokens and of the one past the end: official code that feeds the
    last token computes that row and uses it for nothing.
    """
    return predicted(generator, tokens, condition, generator.layout.length + 1, entities)


def accuracy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of the tokens that are the likeliest ones."""
    return (logits.argmax(-1) == tokens).float().mean()


def with_dropped(condition: Condition, generator: Generator, dropped: Tensor) -> Condition:
    """The null condition where `dropped` [B] is not 0."""
    return condition.where(dropped == 0, generator.null(condition))


def filtered(recording: Recording, pattern: str, logits: str) -> Outputs:
    """Probabilities of the recorded `logits` behind temperature and filters of every run."""
    given = recording.inputs[logits]
    return {name: choice_of(settings).probs(given) for name, settings in recording.each(pattern)}


def power_cosine(settings: Mapping[str, Any]) -> PowerCosine:
    """The schedule of official code that never reaches its scale."""
    power = settings["guidance_scale_pow"]
    return PowerCosine(settings["guidance_scale"], power, reach_end=False)


def by_power_cosine(settings: Mapping[str, Any]) -> Guidance:
    """Guidance by that schedule; a scale of 0 is one branch."""
    return Guidance(power_cosine(settings)) if settings["guidance_scale"] else NO_GUIDANCE


def schedule_of(kind: str, scale: float, schedules: Schedules) -> GuidanceSchedule:
    """The guidance schedule of an official name; raises UserError where there is none."""
    if kind not in schedules:
        there = ", ".join(schedules)
        raise UserError(f"the guidance schedule {kind!r} is not known; there are {there}")
    return schedules[kind](scale)


def guidance_of(scale: float, kind: str, schedules: Schedules) -> Guidance:
    """Guidance by the schedule of an official name; none at a scale of 1."""
    if scale == 1:
        return NO_GUIDANCE
    return Guidance(schedule_of(kind, scale, schedules))


def learning_rates(schedule: Schedule, peak: float, steps: Tensor, total: int) -> Tensor:
    """Rates at the given steps of a run of `total` steps, in float64."""
    factors = [schedule.factor(step, total) for step in steps.tolist()]
    return peak * torch.tensor(factors, dtype=torch.float64)
