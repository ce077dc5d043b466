"""Schedules of the learning rate and of weight decay: pure functions of a step and the length of
the run.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then constant, and from `decay_start` (a share of the
    run) on a decay.

    `final` is the factor at the end: constant keeps 1, the others fall to it: linear, cosine, or
    sqrt, which is 1 - sqrt(progress) (warm-up, stable, decay: arXiv 2405.18392). The warm-up begins
    at 1 / `warmup`, so that no update is lost, unless `warmup_from` says at which factor the first
    update is. `final_weight_decay` is what the optimizer's weight decay changes to along half a
    cosine over the whole run (VAR); null keeps it. `length`: updates that the decay is spread over,
    where that is not the run's length (a run that stops before does not reach `final`). At each of
    `milestones`, updates, the factor falls to `milestone_factor` of itself, whatever the decay.
    """

    decay: Literal["constant", "linear", "cosine", "sqrt"] = "constant"
    warmup: int = 0
    decay_start: float = 0.0
    final: float = 0.0
    warmup_from: float | None = None
    final_weight_decay: float | None = None
    length: int | None = None
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError for numbers outside of their range; a comparison is false for NaN."""
        if not isinstance(self.milestones, (list, tuple)):
            raise ValueError(f"schedule.milestones is {self.milestones!r}; it is a list of updates")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        shares = {
            "decay_start": self.decay_start,
            "final": self.final,
            "milestone_factor": self.milestone_factor,
        }
        if self.warmup_from is not None:
            shares["warmup_from"] = self.warmup_from
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"schedule.{name} is {value}; it must be in [0, 1]")
        if self.warmup < 0:
            raise ValueError(
                f"schedule.warmup is {self.warmup}; it is a number of updates, at least 0"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(
                f"schedule.length is {self.length}; it is a number of updates, at least 1"
            )
        if any(milestone < 1 for milestone in self.milestones):
            raise ValueError(
                f"schedule.milestones are {list(self.milestones)}; they are updates, at least 1"
            )
        if self.final_weight_decay is not None and not 0 <= self.final_weight_decay < math.inf:
            raise ValueError(
                f"schedule.final_weight_decay is {self.final_weight_decay}; it must be at least 0 and finite"
            )

    def factor(self, step: int, total: int) -> float:
        """Factor of the peak learning rate at update `step` (0-based) of `total`."""
        passed = sum(step >= milestone for milestone in self.milestones)
        dropped = self.milestone_factor**passed
        return dropped * self.warmup_factor(step) * self.decay_factor(step, self.length or total)

    def weight_decay(self, initial: float, step: int, total: int) -> float:
        """Weight decay at update `step` (0-based) of `total`, of a group that begins with
        `initial`; 0 stays 0.
        """
        if self.final_weight_decay is None or initial == 0:
            return initial
        progress = min(1.0, step / max(1, total - 1))
        left = (1 + math.cos(math.pi * progress)) / 2
        return self.final_weight_decay + (initial - self.final_weight_decay) * left

    def warmup_factor(self, step: int) -> float:
        if step >= self.warmup:
            return 1.0
        if self.warmup_from is None:
            return (step + 1) / self.warmup
        return self.warmup_from + (1 - self.warmup_from) * step / self.warmup

    def decay_factor(self, step: int, total: int) -> float:
        start = max(self.decay_start * total, self.warmup if self.decay_start == 0 else 0)
        if self.decay == "constant" or step <= start:
            return 1.0
        progress = min(1.0, (step - start) / max(1.0, total - start))
        shapes = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "sqrt": 1 - math.sqrt(progress),
        }
        return self.final + (1 - self.final) * shapes[self.decay]
