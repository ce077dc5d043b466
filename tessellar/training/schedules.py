"""Learning-rate schedules: pure functions from a step to a factor of the peak rate."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then constant, and from `decay_start` (a share of the run) on a decay.

    `final` is the factor at the end: constant keeps 1, linear and cosine fall to it.
    """

    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    decay_start: float = 0.0
    final: float = 0.0

    def factor(self, step: int, total: int) -> float:
        """Factor of the peak learning rate at update `step` (0-based) of `total`."""
        return min(1.0, (step + 1) / self.warmup if self.warmup else 1.0) * self._decay(step, total)

    def _decay(self, step: int, total: int) -> float:
        start = max(self.decay_start * total, self.warmup if self.decay_start == 0 else 0)
        if self.decay == "constant" or step <= start:
            return 1.0
        progress = min(1.0, (step - start) / max(1.0, total - start))
        shape = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * shape
