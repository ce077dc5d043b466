"""Gaussian diffusion with a learned variance: schedule, respacing, losses, one reverse step (arXiv
2102.09672).

What MAR's diffusion loss uses (arXiv 2406.11838): cosine betas, noise prediction, and a variance
interpolated between beta_t and the posterior's. Tables are float64 and read as float32.

Ancestral diffusion sampling of an entity: from noise to data in respaced reverse steps (MAR, arXiv
2406.11838).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import cos, log, pi, sqrt

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.distribution import Model
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole

TRAINING_STEPS = 1000


def cosine_betas(steps: int = TRAINING_STEPS) -> Tensor:
    """beta_i = min(1 - abar((i + 1) / T) / abar(i / T), 0.999), abar(s) = cos^2(pi / 2 (s + 0.008)
    / 1.008).
    """

    def survival(s: float) -> float:
        return cos((s + 0.008) / 1.008 * pi / 2) ** 2

    betas = [min(1 - survival((i + 1) / steps) / survival(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def linear_betas(steps: int = TRAINING_STEPS) -> Tensor:
    """From 1e-4 to 0.02 in even steps (DDPM, arXiv 2006.11239)."""
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device="cpu")


def kept_steps(count: int, total: int = TRAINING_STEPS) -> list[int]:
    """`count` of `total` steps, evenly from the first to the last; raises UserError where there are
    not that many.
    """
    if not 1 <= count <= total:
        raise UserError(f"{count} diffusion steps; give 1 to {total}")
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    return [round(j * stride) for j in range(count)]


def strided_steps(count: int, total: int = TRAINING_STEPS) -> list[int]:
    """`count` steps at the smallest integer stride that gives them, from 0 (`ddimN` of the official
    option string).
    """
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise UserError(f"no integer stride gives {count} of {total} steps")


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A process over `steps` (original step numbers, ascending) with their `betas`."""

    betas: Tensor
    steps: tuple[int, ...]

    @cached_property
    def survival(self) -> Tensor:
        """abar_t, the share of the signal's variance that is left."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def _before(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.survival[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.betas * (1 - self._before) / (1 - self.survival)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm; that of the first step, which is -inf, is replaced by the next one's."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def coefficient_clean(self) -> Tensor:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * self._before.sqrt() / (1 - self.survival)

    @cached_property
    def coefficient_noisy(self) -> Tensor:
        """Weight of x_t in that mean."""
        return (1 - self._before) * (1 - self.betas).sqrt() / (1 - self.survival)

    def noisy(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(. | x_0): clean and noise [n, C], t [n] indices of this process."""
        return (
            self._at(self.survival.sqrt(), t) * clean
            + self._at((1 - self.survival).sqrt(), t) * noise
        )

    def posterior_mean(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self._at(self.coefficient_clean, t) * clean + self._at(self.coefficient_noisy, t) * x

    def clean_of(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 of the noise that was predicted, not clipped."""
        inverse = 1 / self.survival
        return self._at(inverse.sqrt(), t) * x - self._at((inverse - 1).sqrt(), t) * eps

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """f log beta + (1 - f) log posterior variance, f = (v + 1) / 2."""
        share = (v + 1) / 2
        return share * self._at(self.betas.log(), t) + (1 - share) * self._at(
            self.posterior_log_variance, t
        )

    def reverse(
        self,
        x: Tensor,
        t: int,
        eps: Tensor,
        v: Tensor,
        noise: Tensor | None,
        temperature: float,
        clip: float | None = None,
    ) -> Tensor:
        """x_{t-1} from x_t; `temperature` scales the standard deviation, no noise means the mean; the
        predicted data is kept within +-`clip`.
        """
        index = torch.tensor(t, device=x.device)
        clean = self.clean_of(x, index, eps)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        mean = self.posterior_mean(clean, x, index)
        if noise is None:
            return mean
        return mean + temperature * (0.5 * self.log_variance(v, index)).exp() * noise

    def losses(
        self, eps: Tensor, v: Tensor, clean: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the noise and variational bound in bits, both [n], means over channels.

        The bound teaches the variance alone: `eps` is detached in it. At t = 0 it is the likelihood
        of a bin of half width 1 / 255.
        """
        # KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of two normals, arXiv 2006.11239 eq. 5.
        x = self.noisy(clean, t, noise)
        mean = self.posterior_mean(clean, x, t)
        log_variance = self._at(self.posterior_log_variance, t)
        own_mean = self.posterior_mean(self.clean_of(x, t, eps.detach()), x, t)
        own = self.log_variance(v, t)
        divergence = 0.5 * (
            own
            - log_variance
            - 1
            + (log_variance - own).exp()
            + (mean - own_mean) ** 2 * (-own).exp()
        )
        surprise = -bin_log_likelihood(clean, own_mean, 0.5 * own)
        # The first step has no KL: it decodes, and is scored by the likelihood of 8-bit bins.
        bound = torch.where(t[:, None] == 0, surprise, divergence).mean(-1) / log(2)
        return (noise - eps).square().mean(-1), bound

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        """Rows [n, 1] of a table at t [n] (or [1] at one t), float32."""
        return table.to(t.device)[t].float()[..., None]


def full_process() -> Diffusion:
    """The process of training, all 1,000 steps."""
    return Diffusion(cosine_betas(), tuple(range(TRAINING_STEPS)))


@lru_cache
def linear_process() -> Diffusion:
    """All 1,000 steps with linear betas (Semanticist, arXiv 2503.08685)."""
    return Diffusion(linear_betas(), tuple(range(TRAINING_STEPS)))


def respaced(process: Diffusion, steps: list[int]) -> Diffusion:
    """The process over some steps only: betas of their cumulative products; networks still see
    original numbers.
    """
    # beta'_i = 1 - abar(s_i) / abar(s_{i-1}), so that abar at the kept steps stays what it was.
    survival = process.survival[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), survival[:-1]])
    return Diffusion(1 - survival / before, tuple(process.steps[s] for s in steps))


def bin_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of half width 1 / 255 around x; open outside of +-0.999 (tanh form
    of the normal).
    """

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))

    # The outermost bins reach to infinity, so that all of them add up to 1.
    scale = (-log_std).exp()
    upper = below(scale * (x - mean + 1 / 255))
    lower = below(scale * (x - mean - 1 / 255))
    floor = 1e-12
    inside = (upper - lower).clamp(min=floor).log()
    ends = torch.where(x > 0.999, (1 - lower).clamp(min=floor).log(), inside)
    return torch.where(x < -0.999, upper.clamp(min=floor).log(), ends)


@dataclass(frozen=True)
class DiffusionSampler(ABC):
    """How an entity is drawn by a diffusion head, in `steps` evaluations of it.

    `last_steps` anneals the steps linearly to that number at the last entity (DiSA, arXiv
    2505.20297).
    """

    steps: int = 100
    last_steps: int | None = None

    def __post_init__(self) -> None:
        check_whole("diffusion steps", self.steps, 2, TRAINING_STEPS)
        if self.last_steps is not None:
            check_whole("diffusion last_steps", self.last_steps, 2, TRAINING_STEPS)

    def steps_of(self, entity: int, count: int) -> int:
        """Evaluations for entity number `entity` of `count`."""
        if self.last_steps is None or count == 1:
            return self.steps
        return round(self.steps + (self.last_steps - self.steps) * entity / (count - 1))

    @abstractmethod
    def integrate(
        self, model: Model, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1
    ) -> Tensor:
        """Draw [B, *shape]; `model(x, t)` gives predicted noise and variance share in 2 C channels."""


@dataclass(frozen=True)
class AncestralDiffusion(DiffusionSampler):
    """Reverse steps of a respaced process (MAR, arXiv 2406.11838).

    `temperature` scales the noise of each step, not the start. `clip` bounds the data that a step
    predicts (DDPM's clip_denoised; MAR has none): at the first step an error of the predicted noise
    grows some 20,000 times, which a head that is trained for long never makes.
    """

    temperature: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("diffusion temperature", self.temperature, least=0)
        if self.clip is not None:
            check_number("diffusion clip", self.clip, above=0)

    def integrate(
        self, model: Model, shape: tuple[int, int], noise: Noise, entity: int = 0, count: int = 1
    ) -> Tensor:
        process = process_of(self.steps_of(entity, count))
        return ancestral_diffusion(
            model, process, shape, noise, temperature=self.temperature, clip=self.clip
        )


@lru_cache
def process_of(steps: int) -> Diffusion:
    return respaced(full_process(), kept_steps(steps))


def ancestral_diffusion(
    model: Model,
    process: Diffusion,
    shape: tuple[int, int],
    noise: Noise,
    temperature: float,
    clip: float | None = None,
) -> Tensor:
    """Reverse steps of a process; the last one adds no noise."""
    x = noise.normal(*shape)
    for t in reversed(range(len(process.steps))):
        eps, v = model(x, x.new_tensor(process.steps[t])).chunk(2, -1)
        drawn = noise.normal(*shape) if t else None
        x = process.reverse(x, t, eps, v, drawn, temperature=temperature, clip=clip)
    return x
