"""Locality-aware orders of a grid (LPD, arXiv 2507.01957, section 3.3): near what is known, far
from what comes with it.

The cells of a group are first those best supported by cells of earlier groups, if they keep a
distance from each other; what is missing are cells as far as possible from those taken. Chance
enters as `Chances`, so that an order is a pure function of them. Sizes of groups are the published
tables where there are, else the rule behind them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, floor, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessellar.errors import UserError

# Published sizes of groups that the rule below does not give: tokens, steps -> (size, how often) in turn.
TABLES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (256, 128): ((1, 41), (2, 46), (3, 41)),
    (256, 64): ((1, 10), (2, 7), (3, 7), (4, 9), (5, 11), (6, 20)),
    (256, 32): (
        *((1, 2), (2, 2), (3, 2), (4, 1), (5, 2), (6, 2), (7, 2), (8, 2), (9, 2)),
        *((10, 3), (11, 4), (12, 8)),
    ),
    (256, 24): (
        *((size, 1) for size in range(1, 11)),
        *((11, 2), (12, 1), (13, 1), (14, 3), (15, 2), (16, 3), (17, 2)),
    ),
    (256, 16): (
        *((size, 1) for size in (1, 4, 6, 8, 11, 13, 15, 17, 19, 20, 22, 23)),
        *((24, 3), (25, 1)),
    ),
    (256, 8): tuple((size, 1) for size in (1, 15, 24, 32, 40, 45, 49, 50)),
    (1024, 32): (
        *((size, 1) for size in (1, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27, 29, 31, 33, 35, 36)),
        *((38, 1), (40, 1), (41, 1), (42, 1), (44, 1), (45, 1), (46, 1), (47, 1)),
        *((48, 2), (49, 2), (50, 3)),
    ),
}


@lru_cache(maxsize=64)
def local_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Sizes of `steps` groups of `length` tokens in all, growing with a cosine; the first is one
    token.

    Raises UserError for more steps than tokens, or none.
    """
    if not 1 <= steps <= length:
        raise UserError(f"{length} tokens cannot be generated in {steps} steps: give 1 to {length}")
    if (length, steps) in TABLES:
        published: list[int] = []
        for size, times in TABLES[length, steps]:
            published += [size] * times
        return tuple(published)
    if steps == 1:
        return (length,)
    # n_k = N (cos(pi (k - 1) / 2 K) - cos(pi k / 2 K)), and what rounding leaves is taken from, or given to, the
    # sizes that it moved most.
    exact = []
    sizes = []
    for k in range(steps):
        size = length * (cos(pi * k / (2 * steps)) - cos(pi * (k + 1) / (2 * steps)))
        exact.append(size)
        sizes.append(max(1, round(size)))
    sizes[0] = 1
    while sum(sizes) != length:
        change = 1 if sum(sizes) < length else -1
        movable = [k for k in range(1, steps) if sizes[k] + change >= 1]
        chosen = max(movable, key=lambda k: change * (exact[k] - sizes[k]))
        sizes[chosen] += change
    return tuple(sizes)


@dataclass(frozen=True)
class Chances:
    """What is left to chance in one order of N cells in K groups.

    `first`: the cell that comes first. `ranks` [K, N]: numbers by which the cells of a step are
    shuffled, smallest first. `start`: of a step and the cells to choose from, the one that a group
    of no supported cell starts with.
    """

    first: int
    ranks: np.ndarray
    start: Callable[[int, Sequence[int]], int]

    @classmethod
    def of(cls, uniform: Tensor) -> "Chances":
        """From uniform draws [K, N + 1] in [0, 1)."""
        draws = uniform.double().cpu().numpy()
        ranks = draws[:, :-1]
        last = draws[:, -1]

        def start(step: int, cells: Sequence[int]) -> int:
            return cells[int(last[step] * len(cells))]

        return cls(start(0, range(ranks.shape[1])), ranks, start)


@dataclass(frozen=True)
class Thresholds:
    """Which cells may stand together in a group.

    `proximity`: the least support by known neighbours of a cell that is taken at once: 1 for each
    at its edges, 0.71 for each at its corners. `repulsion`: no two of these are this near to each
    other, in rows and in columns.
    """

    proximity: float = 1.0
    repulsion: float = 2.0

    def __post_init__(self) -> None:
        if not (self.proximity >= 0 and self.repulsion >= 0):
            raise UserError(
                f"proximity {self.proximity} and repulsion {self.repulsion} of an order must be at least 0"
            )


def local_order_of(
    grid: tuple[int, int], sizes: Sequence[int], chances: Chances, thresholds: Thresholds
) -> list[int]:
    """Cells of a grid in raster numbers, in groups of `sizes`."""
    rows, columns = grid
    order = _Order(rows, columns, thresholds, chances)
    others = order.spread([chances.first], order.shuffled(0).tolist(), sizes[0] - 1)
    order.add([chances.first, *others])
    for step, size in enumerate(sizes[1:], start=1):
        order.add(order.group(step, size))
    return order.cells


class Grid(NamedTuple):
    """Distances within a grid of N cells."""

    apart: np.ndarray  # [N, N] squared distances
    near: list[np.ndarray]  # of each cell its neighbours at edges and corners
    support: list[np.ndarray]  # 1 / distance of each of them


@lru_cache(maxsize=8)
def grid_of(rows: int, columns: int) -> Grid:
    """The distances of a grid in raster order."""
    place = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    apart = ((place[:, None] - place) ** 2).sum(-1)
    near = []
    support = []
    for row in apart:
        cells = np.flatnonzero((row == 1) | (row == 2))
        near.append(cells)
        support.append(1 / np.sqrt(row[cells]))
    return Grid(apart, near, support)


class _Order:
    """An order in the making: the cells so far, and how far each other is supported by them."""

    def __init__(self, rows: int, columns: int, thresholds: Thresholds, chances: Chances) -> None:
        self.chances = chances
        self.thresholds = thresholds
        self.shape = (rows, columns)
        self.cells: list[int] = []
        self.known = np.zeros(rows * columns, dtype=bool)
        self.support = np.zeros(rows * columns)
        self.grid = grid_of(rows, columns)

    def add(self, group: Sequence[int]) -> None:
        """Make a group known: each neighbour of a cell is supported by 1 / distance, added in this
        order.
        """
        for cell in group:
            self.support[self.grid.near[cell]] += self.grid.support[cell]
        self.known[list(group)] = True
        self.cells += group

    def shuffled(self, step: int) -> np.ndarray:
        """Cells that are not known, best supported first, ties in the step's random order."""
        cells = np.flatnonzero(~self.known)
        return cells[np.lexsort((self.chances.ranks[step][cells], -self.support[cells]))]

    def group(self, step: int, size: int) -> list[int]:
        """The cells of one group in the order of picking (algorithm 1 of the paper)."""
        ordered = self.shuffled(step)
        near = int((self.support[ordered] >= self.thresholds.proximity).sum())
        reach = floor(self.thresholds.repulsion)
        blocked = np.zeros(self.shape, dtype=bool)
        chosen: list[int] = []
        repelled: list[int] = []
        seen = 0
        for cell in ordered[:near].tolist():
            if len(chosen) == size:
                break
            seen += 1
            row, column = divmod(cell, self.shape[1])
            if blocked[row, column]:
                repelled.append(cell)
                continue
            chosen.append(cell)
            top = max(0, row - reach)
            left = max(0, column - reach)
            blocked[top : row + reach + 1, left : column + reach + 1] = True
        pool = [*ordered[near:].tolist(), *repelled, *ordered[seen:near].tolist()]
        missing = size - len(chosen)
        if missing and not chosen and len(pool) > missing:
            chosen.append(self.chances.start(step, pool))
        return chosen + self.spread(chosen, pool, size - len(chosen))

    def spread(self, chosen: Sequence[int], pool: Sequence[int], count: int) -> list[int]:
        """`count` cells of the pool, each the farthest from those chosen so far, the first of
        equals.
        """
        pool = [cell for cell in pool if cell not in chosen]
        if len(pool) <= count or not count:
            return pool[:count]
        cells = np.array(pool)
        gap = self.grid.apart[np.ix_(np.array(chosen), cells)].min(0)
        picked: list[int] = []
        for _ in range(count):
            cell = pool[int(gap.argmax())]
            picked.append(cell)
            gap = np.minimum(gap, self.grid.apart[cell, cells])
        return picked


def seeded_chances(cells: int, steps: int, seed: int) -> Chances:
    """The chances of an order that all images share."""
    draw = torch.Generator().manual_seed(seed)
    return Chances.of(torch.rand(steps, cells + 1, generator=draw, device="cpu"))
