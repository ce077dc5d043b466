"""Adaptive projected guidance (APG, arXiv 2410.02416): guidance without over-saturation at large
scales.

Of the difference between the conditional and the null prediction only the part orthogonal to the
conditional one is amplified; its norm is bounded, and a negative momentum pushes away from what
earlier steps already added. Norms and projections are taken over a whole image, never per pixel or
per batch; the momentum lives as long as one image's draw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.protocol.ranges import check_number


@dataclass(frozen=True)
class APG:
    """`momentum` of the differences, `threshold` on their norm (None: none), share `eta` of the
    parallel part kept.
    """

    momentum: float = -0.5
    threshold: float | None = 2.5
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number("momentum of adaptive projected guidance", self.momentum)
        check_number("eta of adaptive projected guidance", self.eta)
        if self.threshold is not None:
            check_number("threshold of adaptive projected guidance", self.threshold, above=0)

    def step(
        self, conditional: Tensor, null: Tensor, scale: float, average: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Guided prediction [B, ...] of one step, and the average to hand to the next (None at the
        first).
        """
        average = conditional - null + (0 if average is None else self.momentum * average)
        difference = average if self.threshold is None else clipped(average, self.threshold)
        parallel, orthogonal = project(difference, conditional)
        return conditional + (scale - 1) * (orthogonal + self.eta * parallel), average


def clipped(x: Tensor, threshold: float) -> Tensor:
    """x [B, ...] with the norm of each image at most `threshold`."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *(1,) * (x.ndim - 1))
    return x * (threshold / norm.clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)


def project(x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of x [B, ...] parallel and orthogonal to each image's `direction`; computed in float64."""
    along = torch.nn.functional.normalize(direction.double().flatten(1), dim=1).view(
        direction.shape
    )
    parallel = (x.double() * along).flatten(1).sum(1).view(-1, *(1,) * (x.ndim - 1)) * along
    return parallel.to(x.dtype), (x.double() - parallel).to(x.dtype)
