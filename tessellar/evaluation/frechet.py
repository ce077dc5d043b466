"""Fréchet distance between two Gaussians (FID: arXiv 1706.08500, equation 6), by symmetric eigen-decompositions.

Tr (S1 S2)^1/2 equals the sum of the square roots of the eigenvalues of A^T S1 A, where S2 = A A^T. That matrix is
symmetric and never negative, so no complex number and no `sqrtm` appears, singular covariances (fewer images than
features) are exact, and it is many times faster than the matrix square root of the product that other code takes.
"""

import torch

from tessellar.errors import UserError
from tessellar.evaluation.statistics import Moments, rank_tolerance


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2); never below 0. Raises UserError for features of different size."""
    if samples.dim != reference.dim:
        raise UserError(
            f"the samples have {samples.dim} features and the reference {reference.dim}: they come from two networks"
        )
    mean, cov = reference.mean.to(samples.mean), samples.cov
    factor = reference.factor.to(cov)
    product = factor.T @ cov @ factor
    values = torch.linalg.eigvalsh((product + product.T) / 2) if factor.shape[1] else product.new_zeros(1)
    overlap = values[values > rank_tolerance(values)].sqrt().sum()
    spread = cov.trace() + reference.cov.trace().to(cov)
    return max(0.0, float((samples.mean - mean).square().sum() + spread - 2 * overlap))
