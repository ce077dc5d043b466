"""Precision and recall by k-nearest-neighbour manifolds (arXiv 1904.06991), k = 3 as in the ADM
suite.

Precision: share of samples inside the ball of a reference image that reaches to its k-th neighbour;
recall: the reverse. A model that memorises few images shows here: precision near 1, recall low.
Distances are taken in blocks of rows, in float64, of features centred on the reference, so no block
size changes the result. torch-fidelity's function is not called: its float32 `cdist` takes another
path for large sets, and its answer moves with the size of the batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError

BLOCK_ELEMENTS = 2**23  # distances held at once


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


def squared_distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Blocks [b, M] of the squared distances between rows [N, D] and columns [M, D], from the first
    row to the last.
    """
    norms = columns.square().sum(dim=1)
    for block in rows.split(max(1, BLOCK_ELEMENTS // len(columns))):
        yield torch.addmm(
            norms + block.square().sum(dim=1, keepdim=True), block, columns.T, alpha=-2
        ).clamp(min=0)


def radii(features: Tensor, k: int = 3) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, [N]."""
    # The nearest row is the row itself, so its k-th neighbour is the (k + 1)-th smallest distance.
    return torch.cat(
        [block.kthvalue(k + 1, dim=1).values for block in squared_distances(features, features)]
    )


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Of features [N, D] and [M, D]; raises UserError where a side has no k-th neighbour."""
    if min(len(samples), len(reference)) <= k:
        raise UserError(
            f"precision and recall need more than {k} images a side; there are {len(samples)} and {len(reference)}"
        )
    centre = reference.double().mean(dim=0)
    samples = samples.double() - centre
    reference = reference.double() - centre
    sample_radii = radii(samples, k)
    reference_radii = radii(reference, k)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    first = 0
    for block in squared_distances(samples, reference):
        inside += int((block <= reference_radii).any(dim=1).sum())
        covered |= (block <= sample_radii[first : first + len(block), None]).any(dim=0)
        first += len(block)
    return PrecisionRecall(inside / len(samples), float(covered.double().mean()))
