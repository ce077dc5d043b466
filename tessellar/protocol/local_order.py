"""LPD's locality-aware order of a grid (arXiv 2507.01957): near what is known, far from what is
drawn with it.

The paper's are both criteria; the two stages, the support's formula, thresholds in tokens and
growing sizes are as we understand it, not checked against its code.
"""

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor

from tessellar.errors import UserError


def local_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Sizes that grow as 1 - cos(pi k / 2 steps) of the tokens are known after k steps, at least
    one a step.

    Raises UserError for more steps than tokens, or none.
    """
    if not 1 <= steps <= length:
        raise UserError(f"{length} tokens cannot be generated in {steps} steps: give 1 to {length}")
    ends = [0]
    for k in range(1, steps + 1):
        share = round(length * (1 - cos(pi * k / (2 * steps))))
        ends.append(min(max(share, ends[-1] + 1), length - (steps - k)))
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def near_and_apart(
    rows: int,
    columns: int,
    sizes: Sequence[int],
    seed: int = 0,
    near: float = 2.0,
    apart: float = 2.0,
) -> list[int]:
    """Places of a grid in order, for entities of `sizes`.

    An entity first takes candidates within `near` of a known token, the best supported first
    (support: the sum of 1 / distance^2 to known tokens), as long as they lie `apart` or more from
    those already taken; what is missing are the tokens farthest from those taken. Ties are broken
    by `seed`.
    """
    ties = torch.rand(
        rows * columns,
        generator=torch.Generator().manual_seed(seed),
        device="cpu",
        dtype=torch.float64,
    )
    place = torch.cartesian_prod(
        torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
    ).double()
    distance = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
    known = torch.zeros(len(place), dtype=torch.bool, device="cpu")
    order = []
    for size in sizes:
        chosen = _entity(distance, known, size, ties, near, apart)
        known[chosen] = True
        order += chosen
    return order


def _entity(
    distance: Tensor, known: Tensor, size: int, ties: Tensor, near: float, apart: float
) -> list[int]:
    """Places of one entity, given which tokens are known [N] and the distances [N, N]."""
    support = (distance[:, known] ** -2).sum(1)
    nearest = (
        distance[:, known].amin(1) if bool(known.any()) else torch.full_like(support, torch.inf)
    )
    candidates = ((nearest <= near) & ~known).nonzero().flatten().tolist()
    chosen: list[int] = []
    for place in sorted(candidates, key=lambda p: (-round(float(support[p]), 9), float(ties[p]))):
        if len(chosen) < size and all(distance[place, other] >= apart for other in chosen):
            chosen.append(place)
    while len(chosen) < size:
        gap = distance[:, chosen].amin(1) if chosen else torch.zeros_like(support)
        gap = (gap + 1e-6 * ties).masked_fill(known, -1.0)
        gap[chosen] = -1.0
        chosen.append(int(gap.argmax()))
    return chosen
