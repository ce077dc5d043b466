"""Random sets: masked generators of patches of one grid, in an order of each image's own, a growing
set at a time (MAR, arXiv 2406.11838).
"""

from collections.abc import Callable
from itertools import pairwise
from math import ceil, cos, exp, floor, pi

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.entities import Entities, cells, take
from tessellar.protocol.layout import Layout
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise

NARROW = 0.75  # the least share from which on most draws of a bell would be lost


def planned_sizes(patches: int, steps: int) -> tuple[int, ...]:
    """Patches that become known at each step: floor(L cos(pi / 2 (i + 1) / T)) are left behind step
    i, at least one.

    Raises UserError for more steps than patches.
    """
    if not 1 <= steps <= patches:
        raise UserError(f"{steps} steps for {patches} tokens; give 1 to {patches}")
    left = [patches]
    for i in range(1, steps):
        left.append(max(1, min(left[-1] - 1, floor(patches * cos(pi / 2 * i / steps)))))
    return tuple(a - b for a, b in zip(left, [*left[1:], 0], strict=True) if a > b)


def draw_share(least: float) -> float:
    """A share from N(1, 0.25) within [least, 1], by torch's global random numbers.

    Drawn here because `nn.init.trunc_normal_` of torch 2.9 and of 2.15 give other numbers from one
    seed: a run, and a recorded loss, would depend on the version.
    """
    # A draw that falls outside is made again. Where most would, shares are drawn evenly from what
    # is allowed, and kept by the height of the bell there.
    narrow = least > NARROW
    while True:
        if narrow:
            share = float(torch.empty(1).uniform_(least, 1.0))
            kept = float(torch.rand(1)) < exp(-0.5 * ((share - 1) / 0.25) ** 2)
        else:
            share = float(torch.empty(1).normal_(1.0, 0.25))
            kept = least <= share <= 1
        if kept:
            return share


def growing_sizes(steps: int, length: int, known: Callable[[int], int]) -> tuple[int, ...]:
    """Sizes of `steps` sets of `length` tokens: `known(s)` are wanted behind set s; every set has a
    token at least, and the last one takes the rest.

    Raises UserError for more sets than tokens, or none.
    """
    if not 1 <= steps <= length:
        raise UserError(f"{length} tokens cannot be generated in {steps} steps: give 1 to {length}")
    ends = [0]
    for step in range(steps - 1):
        ends.append(min(max(known(step), ends[-1] + 1), length - (steps - 1 - step)))
    return tuple(after - before for before, after in pairwise([*ends, length]))


class RandomSets(MaskedGenerator):
    """Patches of `patch` x `patch` latents each, decoded in `steps` sets unless a plan says
    otherwise.

    `least_masked` is the smallest share of patches that training hides. Raises UserError where the
    patches do not divide the grid, and for layouts without one.
    """

    def __init__(self, layout: Layout, patch: int, steps: int, least_masked: float) -> None:
        super().__init__()
        self.layout = layout
        self.patch = patch
        self.steps = steps
        self.least_masked = least_masked
        self.cells = cells(layout, patch, patch)
        self.length = self.cells.count
        self.entities = self.sets(torch.arange(self.length, device="cpu"), steps)

    def sets(self, order: Tensor, steps: int) -> Entities:
        """Entities of latents from an order of patches [L] or [B, L]; raster order inside each set."""
        sizes = planned_sizes(self.length, steps)
        order = torch.cat([part.sort(-1).values for part in order.split(sizes, dim=-1)], -1)
        places = self.cells.order.view(self.length, -1)[order].flatten(-2)
        return Entities(places, tuple(size * self.patch**2 for size in sizes))

    def free_order(self) -> Entities:
        return self.cells

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """An order of its own for each image."""
        return self.sets(noise.uniform(self.length).argsort(-1).cpu(), steps or self.steps)

    def to_patches(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, C] to [B, L, C p p], channel slowest."""
        cells = take(tokens, self.cells.order.expand(len(tokens), -1))
        return rearrange(cells, "b (l q) c -> b l (c q)", l=self.length)

    def patches_at(self, places: Tensor) -> Tensor:
        """[B, T / p p] patches of the latents at `places` [B, T], given patch by patch."""
        area = self.patch**2
        patch_of = torch.empty(self.layout.length, dtype=torch.int64)
        patch_of[self.cells.order] = torch.arange(self.layout.length) // area
        return patch_of[places[:, ::area]]

    def known_patches(self, known: Tensor) -> Tensor:
        """[B, L] patches that are known, of `known` [B, N] latents."""
        return known[:, self.cells.order[:: self.patch**2]]

    def draw_mask(self, batch: int) -> Tensor:
        """[B, L], True where training hides a patch: one share a batch, N(1, 0.25) within
        [least_masked, 1].
        """
        count = ceil(self.length * draw_share(self.least_masked))
        rank = torch.rand(batch, self.length).argsort(1).argsort(1)
        return rank < count
