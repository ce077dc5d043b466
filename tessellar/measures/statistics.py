"""Mean and covariance of features, summed in float64 while images pass by; memory does not grow
with their number.

Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which loses no digits
where the mean is large against the spread, as sums of squares do. The covariance divides by N - 1,
as numpy.cov and all FID scripts do.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from tessellar.distributed import all_reduce_sum
from tessellar.errors import UserError

FLOAT32 = torch.finfo(torch.float32).eps
BLOCK = 256  # rows gathered before they are multiplied
COLUMNS = 256


@dataclass(frozen=True, eq=False)
class Moments:
    """Gaussian summary of `count` feature vectors (None: not known): `mean` float64 [D], `cov`
    float64 [D, D].
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        dim = self.mean.numel()
        if self.mean.ndim != 1 or self.cov.shape != (dim, dim):
            raise UserError(
                f"statistics have mean {tuple(self.mean.shape)} and covariance {tuple(self.cov.shape)}; "
                "needed are [D] and [D, D]"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise UserError("the statistics hold values that are not finite; compute them again")

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @property
    def rank_bound(self) -> int:
        """The rank of the covariance is at most this."""
        return self.dim if self.count is None else min(self.dim, self.count - 1)

    @cached_property
    def factor(self) -> Tensor:
        """A [D, r] with A A^T = cov and r its rank; computed once, so a reference may serve many
        distances.

        By Cholesky where the covariance is positive definite, else by its eigenvectors.
        """
        if self.cholesky is not None:
            return self.cholesky
        values, vectors = torch.linalg.eigh((self.cov + self.cov.T) / 2)
        keep = values > rank_tolerance(values)
        return vectors[:, keep] * values[keep].sqrt()

    @cached_property
    def cholesky(self) -> Tensor | None:
        """Lower triangle [D, D]; None where the covariance is singular, up to rounding."""
        if self.rank_bound < self.dim:
            return None
        lower, failed = torch.linalg.cholesky_ex((self.cov + self.cov.T) / 2)
        pivots = lower.diagonal().square()
        return None if failed or bool(pivots.min() <= rank_tolerance(pivots)) else lower


def check_covariance(moments: Moments, precision: float, where: str) -> None:
    """Raise UserError, naming `where`, for a matrix that is no covariance: not symmetric, or with
    negative eigenvalues, by more than the rounding of numbers that were kept with `precision`.
    """
    precision = max(precision, FLOAT32)  # whatever a file keeps, many compute in float32
    cov = moments.cov
    largest = float(cov.abs().max())
    if not isfinite(float(moments.mean.square().sum()) + largest**2):
        raise UserError(f"{where}: the statistics are too large to be those of features")
    if float((cov - cov.T).abs().max()) > largest * precision**0.5:
        raise UserError(f"{where}: sigma is not symmetric, so it is no covariance")
    if float(cov.diagonal().min()) < 0:
        raise UserError(f"{where}: sigma has a negative variance, so it is no covariance")
    # Shifted by the largest error that rounding can have brought in, a covariance is positive definite.
    rounding = moments.dim * largest * precision
    shifted = (cov + cov.T) / 2 + rounding * torch.eye(moments.dim, dtype=cov.dtype)
    if largest > 0 and int(torch.linalg.cholesky_ex(shifted).info):
        raise UserError(f"{where}: sigma has negative eigenvalues, so it is no covariance")


def rank_tolerance(values: Tensor) -> Tensor:
    """Eigenvalues [D] of a covariance below it are rounding errors, whose roots would add up to a
    visible sum.
    """
    return values.clamp(min=0).max() * len(values) * torch.finfo(values.dtype).eps


class FeatureStatistics:
    """Count, mean and centred sum of outer products of the features seen so far."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        # Only on and above the diagonal blocks.
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        # Fewer than BLOCK rows: a product of many rows takes less time than many products.
        self.pending: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add features [B, D]; raises UserError if one is not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {tuple(features.shape)}; these statistics need [B, {len(self.mean)}]"
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError(
                "a feature is NaN or infinite: the images or the feature network's weights are broken"
            )
        self.pending.append(features.to(self.mean, copy=True))
        if sum(map(len, self.pending)) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        """Add what is pending to mean and scatter."""
        x = torch.cat([*self.pending, self.mean.new_empty(0, len(self.mean))])
        self.pending = []
        if len(x):
            mean = x.mean(dim=0)
            self._shift(len(x), mean)
            add_outer(self.scatter, x - mean)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add everything that `other` has seen."""
        self.flush()
        other.flush()
        if other.count:
            self._shift(other.count, other.mean)
            self.scatter += other.scatter

    def _shift(self, count: int, mean: Tensor) -> None:
        """Count and mean of both parts, and what the distance of their means adds to the scatter."""
        # Chan et al.: S = S_a + S_b + n_a n_b / (n_a + n_b) (m_b - m_a)(m_b - m_a)^T; S_b comes later.
        total = self.count + count
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self) -> "FeatureStatistics":
        """Statistics over all ranks; one exchange of the means, one of the sums."""
        self.flush()
        count = int(all_reduce_sum(torch.tensor(self.count)))
        whole = FeatureStatistics(len(self.mean), self.mean.device)
        whole.count = count
        if count:
            # The same of all ranks at once: each adds the distance of its mean from the whole one.
            whole.mean = all_reduce_sum(self.mean * self.count) / count
            shift = self.mean - whole.mean
            whole.scatter = all_reduce_sum(torch.addr(self.scatter, shift, shift, alpha=self.count))
        return whole

    def moments(self) -> Moments:
        """Mean and covariance; raises UserError for fewer than two images."""
        self.flush()
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.count}")
        # What lies below the diagonal was not summed; it mirrors what lies above.
        upper = self.scatter.triu()
        return Moments(self.mean.clone(), (upper + upper.triu(1).T) / (self.count - 1), self.count)


def add_outer(scatter: Tensor, x: Tensor) -> None:
    """Add x^T x to `scatter` [D, D] in blocks from the diagonal to the right; what is left of them
    mirrors the rest.
    """
    for start in range(0, x.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        scatter[columns, start:].addmm_(x[:, columns].T, x[:, start:])
