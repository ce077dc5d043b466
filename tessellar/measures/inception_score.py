"""Inception Score (arXiv 1606.03498): exp of the mean KL of p(y | x) from p(y), over splits; kept
as sums by split.

Two conventions are in use and differ in the second decimal: the ADM suite takes blocks of 5,000
images in order, torch-fidelity shuffles (numpy RandomState(2020)) and cuts into 10 parts. Both know
from an image's index which split it belongs to, so the images may pass by in any order and on any
rank, and the state has splits x classes numbers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessellar.distributed import all_reduce_sum
from tessellar.errors import UserError

SplitRule = Literal["blocks-of-5000", "10-shuffled"]
BLOCK = 5000
SPLITS = 10
SHUFFLE_SEED = 2020


class InceptionScore(NamedTuple):
    """Mean and deviation over splits."""

    mean: float
    std: float


def split_of(total: int, rule: SplitRule) -> Tensor:
    """The split of each of `total` images, int64 [total]."""
    if rule == "blocks-of-5000":
        return torch.arange(total) // BLOCK
    splits = min(SPLITS, total)
    bounds = [i * total // splits for i in range(1, splits)]
    by_position = torch.bucketize(
        torch.arange(total), torch.tensor(bounds, dtype=torch.int64), right=True
    )
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(total))
    return torch.empty_like(by_position).scatter_(0, order, by_position)


@dataclass
class ScoreSums:
    """Sums over the images of each split: their number [S], p(y|x) [S, C], and the sum of p log p
    [S]; float64.
    """

    splits: Tensor
    counts: Tensor
    probabilities: Tensor
    negative_entropy: Tensor

    @classmethod
    def empty(cls, total: int, num_classes: int, rule: SplitRule) -> "ScoreSums":
        splits = split_of(total, rule)
        zeros = []
        for shape in ((), (num_classes,), ()):
            zeros.append(torch.zeros(int(splits.max()) + 1, *shape, dtype=torch.float64))
        return cls(splits, *zeros)

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Add images `index` [B] with logits [B, C]."""
        split = self.splits[index.cpu()]
        log_p = logits.cpu().double().log_softmax(dim=1)
        self.counts.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self.probabilities.index_add_(0, split, log_p.exp())
        self.negative_entropy.index_add_(0, split, (log_p.exp() * log_p).sum(dim=1))

    def compute(self) -> InceptionScore:
        """Score over all ranks; raises UserError if a split has no image."""
        counts = all_reduce_sum(self.counts)
        p = all_reduce_sum(self.probabilities)
        if not bool((counts > 0).all()):
            raise UserError(f"the Inception Score needs images in each of its {len(counts)} splits")
        marginal = p / counts[:, None]
        # mean KL(p(y|x) || p(y)) = mean sum p log p - sum p(y) log p(y)
        divergence = all_reduce_sum(self.negative_entropy) / counts - torch.special.xlogy(
            marginal, marginal
        ).sum(dim=1)
        scores = divergence.exp()
        return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))
