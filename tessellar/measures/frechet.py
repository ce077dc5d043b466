"""Fréchet distance between two Gaussians (FID: arXiv 1706.08500, equation 6), by one symmetric
eigenvalue problem.

Tr (S1 S2)^1/2 equals the sum of the square roots of the eigenvalues of A^T S1 A, where S2 = A A^T.
That matrix is symmetric and never negative, so no complex number and no `sqrtm` appears. The
covariance of lower rank is the one that is factored: then fewer images than features leave no zero
eigenvalues, whose rounding errors would be rooted.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.measures.statistics import FeatureStatistics, Moments

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


def subset_sizes(count: int, steps: int = 15) -> list[int]:
    """Sizes of the subsets that the distance of infinitely many samples is extrapolated from."""
    least = min(5000, max(count // 10, 2))
    return torch.linspace(least, count, steps, dtype=torch.float64).long().tolist()


def intercept(sizes: list[int], distances: list[float]) -> float:
    """Ordinary regression of distances on 1 / N, at 1 / N = 0 (arXiv 1911.07023)."""
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    spread = x - x.mean()
    if float(spread.abs().max()) == 0:
        return float(y.mean())
    slope = (spread * (y - y.mean())).sum() / spread.square().sum()
    return float(y.mean() - slope * x.mean())


def distance_at_infinity(features: Tensor, reference: Moments, seed: int = 0) -> float:
    """Fréchet distance without the bias of few samples: extrapolated from random subsets of
    features [N, D], always the same ones (dgm-eval's 15 sizes). Raises UserError below 4 samples.
    """
    if len(features) < 4:
        raise UserError(f"a distance is extrapolated from at least 4 images, not {len(features)}")
    draw = torch.Generator().manual_seed(seed)
    sizes = sorted(set(subset_sizes(len(features))))
    distances = []
    for size in sizes:
        rows = torch.randperm(len(features), generator=draw)[:size]
        statistics = FeatureStatistics(features.shape[1], reference.mean.device)
        statistics.update(features[rows.to(features.device)].to(reference.mean.device))
        distances.append(frechet_distance(statistics.moments(), reference))
    return intercept(sizes, distances)


def mean_ratio(distances: Mapping[str, float], validation: Mapping[str, float]) -> float:
    """Mean over networks of FD(samples, train) / FD(val, train): FDr^6 (arXiv 2604.28190) for its six
    networks; the validation images score 1. Raises UserError for a denominator of 0.
    """
    ratios = []
    for name, distance in distances.items():
        if validation[name] <= 0:
            raise UserError(
                f"{name}: the validation images have distance {validation[name]:g} from the training images; a ratio "
                "needs one above 0"
            )
        ratios.append(distance / validation[name])
    return sum(ratios) / len(ratios)
