"""Sampling settings: everything that decides how tokens are drawn, as a user writes it and as a record keeps it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessellar.processes.diffusion import AncestralDiffusion
from tessellar.processes.flow import Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import GuidanceSettings
from tessellar.protocol.noise import Noise
from tessellar.sampling.algorithms import Algorithm, make_algorithm
from tessellar.sampling.report import Recorder


@dataclass(frozen=True)
class Sampling:
    """Guidance, the draw of a token, and the decoding algorithm with its options.

    What a generator predicts picks how it is drawn: by `choice` (logits), `flow` (velocities) or `diffusion` (a
    diffusion head).
    tessellar/sampling/algorithms.py has the algorithms and their options.
    """

    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    choice: Choice = field(default_factory=Choice)
    algorithm: str = "ancestral"
    options: dict[str, Any] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)
    diffusion: AncestralDiffusion = field(default_factory=AncestralDiffusion)

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> Algorithm:
        """The decoding algorithm; raises UserError for unknown names and options."""
        return make_algorithm(self.algorithm, self.options)

    def tokens(
        self, generator: Generator, condition: Condition, seeds: Sequence[int], recorder: Recorder | None = None
    ) -> Tensor:
        """Tokens [B, N, ...]; image b depends on `seeds[b]` and its condition alone.

        A `recorder` counts what the algorithm does: `recorder.report()`.
        """
        if len(seeds) != condition.batch:
            raise ValueError(f"{condition.batch} images need as many seeds, not {len(seeds)}")
        device = next(generator.parameters()).device
        noise = Noise(seeds, device)
        return self.make()(generator, condition.to(device), self, noise, self.guidance.make(), recorder)

    def describe(self) -> dict[str, Any]:
        """Plain data for records."""
        return {
            **self.guidance.describe(),
            **self.choice.describe(),
            **self.flow.describe(),
            **self.diffusion.describe(),
            "algorithm": self.algorithm,
            **{f"algorithm_{name}": value for name, value in self.make().describe().items()},
        }


GREEDY = Sampling(choice=Choice(temperature=0))
