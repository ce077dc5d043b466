"""Flow matching on straight paths (rectified flow, arXiv 2209.03003): F_t = (1 - t) x + t noise,
velocity noise - x.

t = 1 is pure noise. Times of training are logit-normal, as in xAR, or drawn by a mode (both arXiv
2403.03206); their draws may be stratified over the batch. A solver (`Flow`) goes from noise (t = 1)
to data (t = 0), as xAR draws an entity (arXiv 2502.20388): `EulerMaruyama` takes the reverse SDE of
the straight path, with score -((1 - t) v + x) / t and diffusion 2 t: as exact as the ODE in the
limit of many steps, better with few. The state is kept in float64.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.distribution import Model
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole

TimeLaw = Literal["logit_normal", "mode"]


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """F_t of data and noise [B, n, C] at times that broadcast, as [B, n, 1]."""
    return (1 - t) * x + t * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """Velocity dF/dt of the path, what the network learns."""
    return noise - x


def logit_normal(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Times in (0, 1): sigmoid of standard normal draws of the global stream."""
    return torch.randn(*shape, device=device).sigmoid()


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times towards noise (shift above 1) or data (below): t s / (1 + (s - 1) t) (arXiv 2403.03206)."""
    return t * shift / (1 + (shift - 1) * t)


def mode_times(u: Tensor, scale: float) -> Tensor:
    """Times of uniform draws u: 1 - u - scale (cos^2(pi u / 2) - 1 + u); even at scale 0 (arXiv
    2403.03206).
    """
    return 1 - u - scale * (torch.cos(torch.pi * u / 2).square() - 1 + u)


@in_ranges
@dataclass(frozen=True)
class Times:
    """How the times of training are drawn; `stratified`: one from each of B equal parts, for a
    batch of B.

    `mean` of the normal shifts logit-normal times towards noise, where redundant data (pixels) are
    still uncertain; `std` is its deviation. `time_shift` then moves all times (`shifted`).
    """

    law: TimeLaw = "logit_normal"
    mode_scale: float = 0.0
    stratified: bool = False
    mean: float = 0.0
    std: float = 1.0
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        check_number("time_shift of times", self.time_shift, above=0)
        if self.law not in get_args(TimeLaw):
            raise ValueError(
                f"law of times is {self.law!r}; it must be one of {', '.join(get_args(TimeLaw))}"
            )

    def draw(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Times in (0, 1), [B], of the global stream."""
        drawn = self._drawn(batch, device)
        return drawn if self.time_shift == 1 else shifted(drawn, self.time_shift)

    def of_normal(self, normal: Tensor) -> Tensor:
        """The logit-normal times of normal draws of any shape."""
        return shifted((self.std * normal + self.mean).sigmoid(), self.time_shift)

    def _drawn(self, batch: int, device: torch.device | str | None) -> Tensor:
        if self.law == "logit_normal" and not self.stratified:
            return (self.std * torch.randn(batch, device=device) + self.mean).sigmoid()
        u = torch.rand(batch, device=device)
        if self.stratified:
            # One draw from each of the parts [i / B, (i + 1) / B), in random order.
            u = (torch.randperm(batch, device=device) + u) / batch
        if self.law == "mode":
            return mode_times(u, self.mode_scale)
        # The normal's quantile of a uniform draw; its ends would be infinite.
        tiny = torch.finfo(u.dtype).eps
        normal = sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + tiny, 1 - tiny))
        return (self.std * normal + self.mean).sigmoid()


LAST_TIME = 0.04  # where the noise of the SDE ends; one step without noise goes on to 0


MOST_STEPS = 100_000  # network evaluations of an entity


@dataclass(frozen=True)
class Flow(ABC):
    """How an entity of a flow is drawn, from noise (t = 1) to data (t = 0): a solver with its
    `steps`.

    `steps` counts network evaluations. `last_steps` anneals them linearly from `steps` at the first
    entity to that at the last (DiSA, arXiv 2505.20297): later entities are nearly determined by
    what they see.
    """

    steps: int = 50
    last_steps: int | None = None

    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_whole("flow steps", self.steps, self.least, MOST_STEPS)
        if self.last_steps is not None:
            check_whole("flow last_steps", self.last_steps, self.least, MOST_STEPS)

    @abstractmethod
    def solve(self, model: Model, x: Tensor, steps: int, noise: Noise) -> Tensor:
        """x [B, T, C], float64, of t = 0 from that of t = 1; `model(x, t)` gives velocities."""

    def steps_of(self, entity: int, count: int) -> int:
        """Evaluations for entity number `entity` of `count`."""
        if self.last_steps is None or count == 1:
            return self.steps
        return int(
            (count - 1 - entity) / (count - 1) * (self.steps - self.last_steps) + self.last_steps
        )

    def integrate(
        self, model: Model, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1
    ) -> Tensor:
        """Draw [B, *shape], float32, with the velocities `model(x, t)`."""
        # Hundreds of small steps are added up: float32 would lose what the late ones move.
        start = noise.normal(*shape).double()
        return self.solve(model, start, self.steps_of(entity, count), noise).float()


@dataclass(frozen=True)
class Euler(Flow):
    """Euler steps on the ODE dx = v dt over an even grid from 1 to 0; takes no further noise.

    `time_shift` moves the grid towards noise (`shifted`), `temperature` scales the noise that it
    starts from (both Ming-UniVision's, arXiv 2510.06590).
    """

    time_shift: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("flow time_shift", self.time_shift, least=1e-3, most=1e3)
        check_number("flow temperature", self.temperature, least=0, most=1e3)

    def solve(self, model: Model, x: Tensor, steps: int, noise: Noise) -> Tensor:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = shifted(times, self.time_shift)
        x = self.temperature * x
        for now, after in zip(times[:-1], times[1:], strict=True):
            x = x + (after - now) * model(x, now).double()
        return x


@dataclass(frozen=True)
class EulerMaruyama(Flow):
    """Euler-Maruyama on the reverse SDE dx = (v - t score) dt + sqrt(2 t) dw, whose drift is (2 -
    t) v + x.

    An even grid from 1 to LAST_TIME, then one step to 0 without noise. `temperature` scales the
    noise of each step, not the start (Semanticist's, arXiv 2503.08685).
    """

    temperature: float = 1.0

    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("flow temperature", self.temperature, least=0)

    def solve(self, model: Model, x: Tensor, steps: int, noise: Noise) -> Tensor:
        times = sde_times(steps)
        for number, (now, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
            # v - t score = v + (1 - t) v + x = (2 - t) v + x, since score = -((1 - t) v + x) / t.
            dt = after - now
            x_next = x + dt * ((2 - now) * model(x, now).double() + x)
            if number < steps - 1:
                spread = self.temperature * (2 * now * dt.abs()).sqrt()
                x_next = x_next + spread * noise.normal(*x.shape[1:]).double()
            x = x_next
        return x


@dataclass(frozen=True)
class EulerMaruyamaToData(Flow):
    """The same steps down to `last_time`, then one step of the ODE to 0: the prediction of the data
    there (BitDance, arXiv 2602.14041). `time_shift` moves the grid towards noise (`shifted`).

    In float32 and in the official order of operations: where guidance is strong, its binary head
    grows the last bit of a number to the third digit of what is not saturated.
    """

    last_time: float = 0.05
    time_shift: float = 1.0

    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("flow last_time", self.last_time, least=1e-6, most=0.999)
        check_number("flow time_shift", self.time_shift, least=1e-3, most=1e3)

    def solve(self, model: Model, x: Tensor, steps: int, noise: Noise) -> Tensor:
        # t counts from noise here, and velocities go from noise to data.
        even = torch.linspace(0, 1 - self.last_time, steps)
        grid = (1 / self.time_shift) / (1 / self.time_shift + (1 / even - 1))
        t = grid[0]
        x = x.float()
        for dt in grid.diff():
            v = -model(x, 1 - t.double())
            score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
            drift = v + (1 - t) * score
            x = x + drift * dt + (2 * (1 - t) * dt) ** 0.5 * noise.normal(*x.shape[1:])
            t = t + dt
        last = torch.tensor(1 - self.last_time).double()
        return x - model(x, 1 - last) * self.last_time


def sde_times(steps: int) -> Tensor:
    """The grid of `EulerMaruyama`, [steps + 1], float64."""
    return torch.cat(
        [
            torch.linspace(1, LAST_TIME, steps, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
        ]
    )
