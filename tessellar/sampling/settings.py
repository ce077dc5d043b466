"""Sampling settings: everything that decides how tokens are drawn, one object in Python, in YAML
and in records.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.configured import describe
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.noise import Noise
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.draft_model import DraftModel
from tessellar.sampling.flash import FlashDrafts
from tessellar.sampling.parallel_jacobi import ParallelJacobi
from tessellar.sampling.redrawn import Redrawn
from tessellar.sampling.report import Recorder
from tessellar.sampling.speculative import (
    GroupedJacobi,
    ReusingJacobi,
    SiblingJacobi,
    SpeculativeJacobi,
)
from tessellar.sampling.zipar import ZipAR

ALGORITHMS = (
    Ancestral,
    SpeculativeJacobi,
    SiblingJacobi,
    ReusingJacobi,
    GroupedJacobi,
    DraftModel,
    FlashDrafts,
    ZipAR,
    ParallelJacobi,
    MaskGIT,
    Redrawn,
)


@dataclass(frozen=True)
class Sampling:
    """Guidance, the decoding algorithm, and the draw of a token.

    What a generator predicts picks how it is drawn: by `choice` (logits), `flow` (velocities) or
    `diffusion` (a diffusion head). A number as `guidance` is that scale at every entity.
    """

    if TYPE_CHECKING:  # what callers may give; the fields say what is there afterwards

        def __init__(
            self,
            guidance: GuidanceSchedule | float = ...,
            choice: Choice = ...,
            algorithm: Algorithm = ...,
            flow: Flow = ...,
            diffusion: DiffusionSampler = ...,
        ) -> None: ...

    guidance: GuidanceSchedule = Constant()
    choice: Choice = Choice()
    algorithm: Algorithm = Ancestral()
    flow: Flow = EulerMaruyama()
    diffusion: DiffusionSampler = AncestralDiffusion()

    def __post_init__(self) -> None:
        if isinstance(self.guidance, Real) and not isinstance(self.guidance, bool):
            object.__setattr__(self, "guidance", Constant(float(self.guidance)))
        parts = {"guidance": GuidanceSchedule, "choice": Choice, "algorithm": Algorithm}
        for name, kind in parts.items():
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise UserError(f"{name} is {given!r}; it must be a {kind.__name__}")

    def tokens(
        self,
        generator: Generator,
        condition: Condition,
        seeds: Sequence[int],
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Tokens [B, N, ...]; image b depends on `seeds[b]` and its condition alone.

        A `recorder` counts what the algorithm does: `recorder.report()`.
        """
        if len(seeds) != condition.batch:
            raise ValueError(f"{condition.batch} images need as many seeds, not {len(seeds)}")
        device = next(generator.parameters()).device
        guidance = self.guidance.guidance()
        return self.algorithm(
            generator, condition.to(device), self, Noise(seeds, device), guidance, recorder
        )

    def describe(self) -> dict[str, Any]:
        """Plain data for records: what stands under `sampling` in a YAML that draws in the same
        way.
        """
        described = {part.name: describe(getattr(self, part.name)) for part in fields(self)}
        choice = describe(self.choice)["init_args"]
        for of_some_tokens in ("further_temperatures", "bit_steps"):
            if not choice[of_some_tokens]:
                del choice[of_some_tokens]
        diffusion = describe(self.diffusion)
        if diffusion["init_args"].get("clip", 0.0) is None:
            del diffusion["init_args"]["clip"]
        return {**described, "choice": choice, "diffusion": diffusion}


GREEDY = Sampling(choice=Choice(temperature=0))
