"""Kernel Inception Distance (arXiv 1801.01401): unbiased squared MMD with the kernel (x.y / D +
1)^3, over subsets.

Mean and deviation over 100 random subsets of 1,000 images a side. The subsets come from numpy's
RandomState(2020), drawn in the same order as torch-fidelity draws them, so that both give the same
number on the same features. Its own function is not called: it computes in numpy on the CPU, in the
features' float32, and refuses sets below `subset_size`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessellar.errors import UserError


class KID(NamedTuple):
    """Mean and deviation of the estimate over subsets; slightly negative where both sets are alike."""

    mean: float
    std: float


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel values [M, N] of rows x [M, D] and y [N, D]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of M rows, pairs of a row with itself left out."""
    m = len(x)
    within = [k.sum() - k.trace() for k in (polynomial_kernel(x, x), polynomial_kernel(y, y))]
    return (within[0] + within[1]) / (m * (m - 1)) - 2 * polynomial_kernel(x, y).mean()


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KID:
    """KID of features [N, D] and [M, D]; sets smaller than `subset_size` lower it. Computed in
    float64.
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise UserError(
            f"KID needs at least 2 images a side; there are {len(samples)} and {len(reference)}"
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        sides = []
        for side in (samples, reference):
            rows = torch.from_numpy(draw.choice(len(side), size, replace=False))
            sides.append(side[rows.to(side.device)].double())
        x, y = sides
        values.append(float(unbiased_mmd(x, y)))
    return KID(float(np.mean(values)), float(np.std(values)))
