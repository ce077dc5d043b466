"""CMMD (arXiv 2401.09603): maximum mean discrepancy with a Gaussian kernel of width 10 between CLIP
embeddings of unit length, as its authors compute it: biased (pairs of a row with itself count),
times 1,000.
"""

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.measures.precision_recall import squared_distances

SIGMA = 10.0
SCALE = 1000.0


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float = SIGMA) -> float:
    """SCALE times the squared discrepancy of rows [N, D] and [M, D], in blocks, in float64."""
    if not len(x) or not len(y):
        raise UserError("CMMD needs images on both sides")
    x = x.double()
    y = y.double()
    return SCALE * (_mean(x, x, sigma) + _mean(y, y, sigma) - 2 * _mean(x, y, sigma))


def _mean(rows: Tensor, columns: Tensor, sigma: float) -> float:
    """Mean of k(r, c) = exp(-|r - c|^2 / (2 sigma^2)) over all pairs."""
    total = 0.0
    for block in squared_distances(rows, columns):
        total += float(torch.exp(block / (-2 * sigma**2)).sum())
    return total / (len(rows) * len(columns))


def cmmd(samples: Tensor, reference: Tensor) -> float:
    """CMMD of embeddings of any length."""
    sides = []
    for side in (samples, reference):
        side = side.double()
        sides.append(side / side.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return gaussian_mmd(*sides)
