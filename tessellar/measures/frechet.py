"""Fréchet distance between two Gaussians (FID: arXiv 1706.08500, equation 6), by one symmetric
eigenvalue problem.

Tr (S1 S2)^1/2 equals the sum of the square roots of the eigenvalues of A^T S1 A, where S2 = A A^T.
That matrix is symmetric and never negative, so no complex number and no `sqrtm` appears. The
covariance of lower rank is the one that is factored: then fewer images than features leave no zero
eigenvalues, whose rounding errors would be rooted.
"""

import torch

from tessellar.errors import UserError
from tessellar.measures.statistics import Moments

# Eigenvalues below so many units of rounding of the largest one are taken as zero.
NOISE = 64


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2); never below 0. Raises UserError for features of
    different size.
    """
    if samples.dim != reference.dim:
        raise UserError(
            f"the samples have {samples.dim} features and the reference {reference.dim}: they come from two networks"
        )
    lower, higher = (
        (samples, reference) if samples.rank_bound < reference.rank_bound else (reference, samples)
    )
    # S2 = A A^T. The non-zero eigenvalues of S1 A A^T are those of A^T S1 A.
    factor = lower.factor.to(samples.cov)
    product = factor.T @ higher.cov.to(factor) @ factor
    values = (
        torch.linalg.eigvalsh((product + product.T) / 2)
        if factor.shape[1]
        else product.new_zeros(1)
    )
    rounding = float(values.max()) * NOISE * torch.finfo(values.dtype).eps
    if float(values.min()) < rounding and higher.cholesky is None:
        # Of a singular covariance these are zeros, else small numbers that count.
        values = values[values > rounding]
    overlap = values.clamp(min=0).sqrt().sum()
    shift = samples.mean - reference.mean.to(samples.mean)
    spread = samples.cov.trace() + reference.cov.trace().to(samples.cov)
    return max(0.0, float(shift.square().sum() + spread - 2 * overlap))
