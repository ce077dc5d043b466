"""Density and coverage (arXiv 2002.09797): precision and recall that outliers do not inflate.

A real image's ball reaches to its k-th nearest other real image (k = 5). Density is the mean number
of balls a sample lies in, over k: it can exceed 1, and is 1 where both distributions are one.
Coverage is the share of balls that hold a sample. Strict `<`, as the authors have it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.measures.precision_recall import radii, squared_distances

K = 5


class DensityCoverage(NamedTuple):
    """Density at least 0, coverage in [0, 1]."""

    density: float
    coverage: float


def density_coverage(samples: Tensor, reference: Tensor, k: int = K) -> DensityCoverage:
    """Of features [N, D] and [M, D]; raises UserError where a reference image has no k-th
    neighbour.
    """
    if len(reference) <= k or not len(samples):
        raise UserError(
            f"density and coverage need samples and more than {k} reference images; there are {len(samples)} and "
            f"{len(reference)}"
        )
    centre = reference.double().mean(dim=0)
    samples = samples.double() - centre
    reference = reference.double() - centre
    reach = radii(reference, k)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for block in squared_distances(samples, reference):
        holds = block < reach
        inside += int(holds.sum())
        covered |= holds.any(dim=0)
    return DensityCoverage(inside / (k * len(samples)), float(covered.double().mean()))


def expected_coverage(reference: int, samples: int, k: int = K) -> float:
    """Coverage of `samples` draws from the distribution of `reference` images themselves: choose k
    so that it exceeds 0.95. For equal numbers N it is 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)).
    """
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (reference - i) / (reference + samples - i)
    return 1 - missed
