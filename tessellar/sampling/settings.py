"""Sampling settings: everything that decides how tokens are drawn, as a user writes it and as a record keeps it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.condition import Condition
from tessellar.models.generator import Generator
from tessellar.sampling.choice import Choice
from tessellar.sampling.decode import ancestral
from tessellar.sampling.guidance import GuidanceSettings
from tessellar.sampling.noise import Noise

Algorithm = Callable[..., Tensor]
ALGORITHMS: dict[str, Algorithm] = {"ancestral": ancestral}
"""Decoding algorithms by name: (generator, condition, sampler, noise, guidance) -> tokens."""


@dataclass(frozen=True)
class Sampling:
    """Guidance, the draw of a token, and the decoding algorithm."""

    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    choice: Choice = field(default_factory=Choice)
    algorithm: str = "ancestral"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"decoding algorithm {self.algorithm!r} does not exist; there are {', '.join(ALGORITHMS)}")

    def tokens(self, generator: Generator, condition: Condition, seeds: Sequence[int]) -> Tensor:
        """Tokens [B, N, ...]; image b depends on `seeds[b]` and its condition alone."""
        if len(seeds) != condition.batch:
            raise ValueError(f"{condition.batch} images need as many seeds, not {len(seeds)}")
        device = next(generator.parameters()).device
        noise = Noise(seeds, device)
        return ALGORITHMS[self.algorithm](generator, condition.to(device), self.choice, noise, self.guidance.make())

    def describe(self) -> dict[str, Any]:
        """Plain data for records."""
        return {**self.guidance.describe(), **self.choice.describe(), "algorithm": self.algorithm}
