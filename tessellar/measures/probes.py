"""Probes with a closed form: ridge regression, nearest neighbours, and ranks of a retrieval.

All work in float64 on whole sets: N vectors of D numbers need N D and D^2 numbers of memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError

LARGEST = 8192  # numbers of a vector: their covariance takes 0.5 GB
ROWS = 1024  # of a table of similarities that is held at once


class Standard(NamedTuple):
    """Mean and deviation [D] of training vectors; numbers that never vary count as constant."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors.double() - self.mean) / self.deviation


def standard_of(vectors: Tensor) -> Standard:
    """The standardisation of vectors [N, D]; raises UserError for vectors that are too long."""
    if vectors.shape[1] > LARGEST:
        raise UserError(
            f"a feature has {vectors.shape[1]} numbers; a probe takes {LARGEST}: average it over "
            "positions (--pooling mean) or choose another"
        )
    vectors = vectors.double()
    deviation = vectors.std(dim=0, correction=0)
    varies = deviation > 1e-9 * vectors.abs().amax().clamp(min=1e-300)
    return Standard(vectors.mean(0), torch.where(varies, deviation, torch.inf))


class Ridge(NamedTuple):
    """Predictions x W + b, with W [D, K] and b [K]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors.double() @ self.weight + self.bias


def ridge(vectors: Tensor, targets: Tensor, penalty: float) -> Ridge:
    """The W and b of least |X W + b - Y|^2 / N + penalty |W|^2, of vectors [N, D] and targets [N,
    K]; b is not penalised.
    """
    x = vectors.double()
    y = targets.double()
    mean = x.mean(0)
    centred = x - mean
    gram = centred.T @ centred / len(x)
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)) / len(x))
    return Ridge(weight, y.mean(0) - mean @ weight)


def chosen_penalty(vectors: Tensor, targets: Tensor, penalties: tuple[float, ...]) -> float:
    """The penalty with which a ridge of all but every tenth vector has the least squared error on
    those; the first of equals.
    """
    held_out = torch.arange(len(vectors)) % 10 == 9
    errors = []
    for penalty in penalties:
        fitted = ridge(vectors[~held_out], targets[~held_out], penalty)
        left = fitted(vectors[held_out]) - targets[held_out].double()
        errors.append(float(left.square().mean()))
    return penalties[errors.index(min(errors))]


def ridge_classes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, penalties: tuple[float, ...]
) -> Tensor:
    """Classes [M] of `test` [M, D]: the largest of the ridge's predictions of one-hot labels, after
    standardisation by the training vectors.
    """
    standard = standard_of(train)
    targets = F.one_hot(labels, classes)
    known = standard(train)
    fitted = ridge(known, targets, chosen_penalty(known, targets, penalties))
    return fitted(standard(test)).argmax(1)


def neighbour_classes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, count: int, temperature: float
) -> Tensor:
    """Classes [M] of `test` [M, D]: the `count` training vectors of largest cosine vote with weight
    exp(cosine / temperature) (DINO, arXiv 2104.14294).
    """
    known = F.normalize(train.double(), dim=-1)
    votes_for = F.one_hot(labels, classes).double()
    found = []
    for rows in F.normalize(test.double(), dim=-1).split(ROWS):
        similar = (rows @ known.T).topk(min(count, len(known)), dim=1)
        weights = (similar.values / temperature).exp()
        votes = (weights[..., None] * votes_for[similar.indices]).sum(1)
        found.append(votes.argmax(1))
    return torch.cat(found)


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """How many candidates stand before the first right one, int64 [M]: `scores` [M, M] of query i
    (row) and candidate j; right is every candidate of the query's group.

    A wrong candidate of equal score stands before.
    """
    right = groups[:, None] == groups[None, :]
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
