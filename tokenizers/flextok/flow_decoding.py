"""What a tokenizer whose decoder is a flow needs: how it decodes, how it is trained, and the guided
Euler solver.

Rectified flow (arXiv 2209.03003) with classifier-free guidance (arXiv 2207.12598) or its adaptive projection (arXiv
2410.02416); nested dropout (arXiv 1402.0915) draws how many tokens an image keeps. As FlexTok has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.processes import flow
from tessellar.processes.apg import APG
from tessellar.processes.flow import Euler
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole

Lengths = Literal["pow2", "uniform", "uniform_pow2", "all"]
Scale = float | Callable[[float], float]
"""Guidance scale, or the scale at a time t (1 is noise)."""


@in_ranges
@dataclass(frozen=True)
class FlowDecoding:
    """How `decode` draws: Euler steps, guidance (1: none), and its projection (None: plain
    guidance).
    """

    steps: int = 20
    guidance: float = 7.5
    projection: APG | None = APG()

    def __post_init__(self) -> None:
        check_whole("steps of the flow decoder", self.steps, least=1)
        check_number("guidance of the flow decoder", self.guidance)


@in_ranges
@dataclass(frozen=True)
class FlowTraining:
    """What a training pass draws and weighs.

    `lengths` of nested dropout: uniform over the powers of two up to N (and N), over 1 to N, over 1
    to N rounded up to a power of two, or always N. `null` is the share of images that see the null
    condition. `repa_weight` multiplies REPA. `sample_posterior`: latents are drawn from the VAE's
    posterior, else its mode.
    """

    lengths: Lengths = "pow2"
    null: float = 0.1
    times: flow.Times = flow.Times()
    repa_weight: float = 1.0
    sample_posterior: bool = True

    def __post_init__(self) -> None:
        if self.lengths not in get_args(Lengths):
            raise ValueError(
                f"lengths is {self.lengths!r}; it must be one of {', '.join(get_args(Lengths))}"
            )
        if not 0 <= self.null <= 1:
            raise ValueError(f"null is {self.null}; a share is in [0, 1]")

    def draw_lengths(self, batch: int, longest: int) -> Tensor:
        """How many registers each of a batch keeps, int64 [B] on the CPU."""
        powers = torch.tensor(
            sorted({2**i for i in range(longest.bit_length()) if 2**i <= longest} | {longest}),
            device="cpu",
        )
        if self.lengths == "all":
            return torch.full((batch,), longest, device="cpu")
        if self.lengths == "pow2":
            return powers[torch.randint(len(powers), (batch,), device="cpu")]
        drawn = torch.randint(1, longest + 1, (batch,), device="cpu")
        return drawn if self.lengths == "uniform" else powers[torch.searchsorted(powers, drawn)]


def solve(
    velocity: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    branches: int,
    decoding: FlowDecoding,
    scale: Scale,
) -> Tensor:
    """Maps [B, C, h, w] drawn from the noise `start` by Euler steps from time 1 to 0, float32.

    `velocity(x, t)` of maps and times [R] knows R = `branches` B rows: conditional ones, then (two
    branches) null ones.
    """
    average: Tensor | None = None

    def guided(x: Tensor, t: Tensor) -> Tensor:
        nonlocal average
        rows = x.float().repeat(branches, 1, 1, 1)
        found = velocity(rows, t.to(x.device, torch.float32).expand(len(rows)))
        if branches == 1:
            return found
        conditional, null = found.chunk(2)
        weight = scale if isinstance(scale, (int, float)) else scale(float(t))
        if decoding.projection is None:
            return null + weight * (conditional - null)
        result, average = decoding.projection.step(conditional, null, weight, average)
        return result

    return Euler().solve(guided, start.double(), decoding.steps, Noise([], start.device)).float()


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each image's velocity, [B]."""
    error = at_least_float32(velocity) - flow.target(latents, noise)
    return error.square().flatten(1).mean(1)
