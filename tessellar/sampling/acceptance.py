"""Acceptance: how likely a drafted token stays, given the law p that it should have and the law q
it was drawn from.

`plain_ratio` is speculative sampling (arXiv 2211.17192, 2302.01318) and exact. `GroupedRatio` is
GSD (2508.07747), an approximation: it compares the mass of a cluster of similar tokens around the
draft. Different from the released code: any group size, clusters cut off at both ends of the order,
tokens that the filters removed are never admitted, and the neighbours of all positions come from
two partial selections. `exact_official` restores the released rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Acceptance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""p, q [..., V] and drafts [...] to acceptance probabilities [...] in [0, 1]; 0 where q gives the draft no mass."""


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """min(1, a / b); 0 where b is 0: such a draft was never drawn."""
    return torch.where(denominator > 0, (numerator / denominator).clamp(max=1), 0.0)


def plain_ratio(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    """min(1, p(d) / q(d))."""
    return ratio(mass(p, draft), mass(q, draft))


def mass(law: Tensor, token: Tensor) -> Tensor:
    """Probability [...] of tokens [...] under laws [..., V]."""
    return law.gather(-1, token[..., None])[..., 0]


class Neighbours(NamedTuple):
    """Tokens next to the draft in ascending order of p: below, the draft, above; -1 where there is
    none.
    """

    tokens: Tensor  # [..., below + 1 + above]
    rank: Tensor  # [...] how many tokens stand below the draft


def neighbours(p: Tensor, draft: Tensor, below: int, above: int) -> Neighbours:
    """The `below` and `above` nearest tokens of drafts [...] in the order of p [..., V]; equal
    values by index.

    One sortable integer a token (the bits of a float >= 0, then the index) makes the order strict,
    so two partial selections give what a stable sort would, at a fifth of its time for 16,384
    codes.
    """
    # The bits of floats >= 0 are ordered as the floats; the lower half breaks ties by index.
    index = torch.arange(p.shape[-1], device=p.device)
    key = (p.float().contiguous().view(torch.int32).to(torch.int64) << 32) | index
    own = key.gather(-1, draft[..., None])
    under = key < own
    largest = torch.iinfo(torch.int64).max
    lower = torch.where(under, key, -1).topk(min(below, p.shape[-1]), -1).values.flip(-1)
    upper = (
        torch.where(key > own, key, largest).topk(min(above, p.shape[-1]), -1, largest=False).values
    )
    keys = torch.cat([lower, own, upper], -1)
    absent = (keys == -1) | (keys == largest)
    return Neighbours(torch.where(absent, -1, keys & 0xFFFFFFFF), under.sum(-1))


@dataclass(frozen=True)
class GroupedRatio:
    """min(1, p(C) / q(C)) over the cluster C of the draft: those of its neighbours in p's order
    that pass both filters.

    `group_size` counts the neighbours and the draft; `p_threshold` bounds |p(x) - p(d)|,
    `d_threshold` the squared distance of embeddings `table` [V, D] (None: no distance filter).
    `exact_official`: drafts of rank below group_size // 2 use the plain ratio, and removed tokens
    count. Otherwise the cluster is cut off at both ends, and a draft with p(d) = 0 is never
    accepted.
    """

    group_size: int = 14
    p_threshold: float = 0.15
    d_threshold: float | None = None
    table: Tensor | None = None
    exact_official: bool = False

    def __call__(self, p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
        near, inside = self.cluster(p, draft)
        known = near.tokens.clamp(min=0)
        grouped = ratio(
            (p.gather(-1, known) * inside).sum(-1), (q.gather(-1, known) * inside).sum(-1)
        )
        grouped = torch.where(mass(q, draft) > 0, grouped, 0.0)
        if self.exact_official:
            return torch.where(near.rank < self.group_size // 2, plain_ratio(p, q, draft), grouped)
        return torch.where(mass(p, draft) > 0, grouped, 0.0)

    def cluster(self, p: Tensor, draft: Tensor) -> tuple[Neighbours, Tensor]:
        """Ranks r - G // 2 .. r + ceil(G / 2) - 1 around the draft, and which of them are in the
        cluster [..., G].
        """
        below = self.group_size // 2
        near = neighbours(p, draft, below, self.group_size - below - 1)
        known = near.tokens.clamp(min=0)
        values = p.gather(-1, known)
        own = mass(p, draft)[..., None]
        inside = (near.tokens >= 0) & ((values - own).abs() < self.p_threshold)
        if self.d_threshold is not None and self.table is not None:
            distance = (self.table[known] - self.table[draft][..., None, :]).square().sum(-1)
            inside &= distance < self.d_threshold
        if not self.exact_official:
            inside &= values > 0
        return near, inside | (near.tokens == draft[..., None])


def distance_quantile(table: Tensor, quantile: float, rows: int = 2048) -> float:
    """Quantile of the squared distances of pairs of different embeddings [V, D]; from `rows` evenly
    spaced ones.
    """
    step = max(1, -(-len(table) // rows))
    chosen = table[::step].float()
    distances = torch.cdist(chosen, chosen).square()
    apart = distances[~torch.eye(len(chosen), dtype=torch.bool, device=table.device)]
    index = min(int(quantile * apart.numel()), apart.numel() - 1)
    return float(apart.kthvalue(index + 1).values)
