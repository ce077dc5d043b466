"""Mean and covariance of features, summed in float64 while images pass by; memory does not grow with their number.

Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which loses no digits where the mean is
large against the spread, as sums of squares do. The covariance divides by N - 1, as numpy.cov and all FID scripts do.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tessellar.distributed import all_reduce_sum
from tessellar.errors import UserError


@dataclass(frozen=True, eq=False)
class Moments:
    """Gaussian summary of `count` feature vectors (None: not known): `mean` float64 [D], `cov` float64 [D, D]."""

    mean: Tensor
    cov: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        dim = self.mean.shape[0]
        if self.mean.ndim != 1 or self.cov.shape != (dim, dim):
            raise UserError(f"statistics have mean {tuple(self.mean.shape)} and covariance {tuple(self.cov.shape)}")
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise UserError("the statistics hold values that are not finite; compute them again")

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @cached_property
    def factor(self) -> Tensor:
        """A [D, r] with A A^T = cov and r its rank; computed once, so a reference may serve many distances."""
        values, vectors = torch.linalg.eigh((self.cov + self.cov.T) / 2)
        keep = values > rank_tolerance(values)
        return vectors[:, keep] * values[keep].sqrt()


def rank_tolerance(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [D] of a covariance below it are rounding errors; their roots would add up to a visible sum."""
    return eigenvalues.clamp(min=0).max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


class FeatureStatistics:
    """Count, mean and centred sum of outer products of the features seen so far."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features [B, D]; raises UserError if one is not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {tuple(features.shape)}; these statistics need [B, {len(self.mean)}]"
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError("a feature is NaN or infinite: the images or the feature network's weights are broken")
        if len(features):
            x = features.to(self.mean)
            mean = x.mean(dim=0)
            self._merge(len(x), mean)
            self.scatter.addmm_((x - mean).T, x - mean)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add everything that `other` has seen."""
        if other.count:
            self._merge(other.count, other.mean)
            self.scatter += other.scatter

    def _merge(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self) -> "FeatureStatistics":
        """Statistics over all ranks; one exchange of the means, one of the sums."""
        count = int(all_reduce_sum(torch.tensor(self.count)))
        whole = FeatureStatistics(len(self.mean), self.mean.device)
        whole.count = count
        if count:
            whole.mean = all_reduce_sum(self.mean * self.count) / count
            shift = self.mean - whole.mean
            whole.scatter = all_reduce_sum(torch.addr(self.scatter, shift, shift, alpha=self.count))
        return whole

    def moments(self) -> Moments:
        """Mean and covariance; raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.count}")
        return Moments(self.mean.clone(), self.scatter / (self.count - 1), self.count)
