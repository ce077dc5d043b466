"""Condition: what an image is generated from (a class label, or caption features), and its null for
guidance.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """Labels `ids` [B], or left-padded text `ids` [B, P] / `features` [B, P, D] with `valid` [B, P]
    (True = real).
    """

    ids: Tensor | None = None
    valid: Tensor | None = None
    features: Tensor | None = None

    @property
    def batch(self) -> int:
        return next(len(t) for t in self if t is not None)

    def select(self, index: Tensor) -> "Condition":
        """Rows `index` [b] of the condition."""
        return Condition(*(None if t is None else t[index] for t in self))

    def to(self, device: torch.device | str) -> "Condition":
        return Condition(*(None if t is None else t.to(device) for t in self))

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """Rows of this condition where `keep` [B] is True, rows of `other` elsewhere
        (classifier-free dropout).
        """
        both = cat([self, other])
        rows = torch.arange(self.batch, device=keep.device)
        return both.select(torch.where(keep, rows, rows + self.batch))


def cat(conditions: list[Condition]) -> Condition:
    """Rows of several conditions in one; texts of unequal length are padded on the left."""
    fields = []
    for values in zip(*conditions, strict=True):
        present = [v for v in values if v is not None]
        fields.append(
            torch.cat([_pad_left(v, max(map(_width, present))) for v in present])
            if present
            else None
        )
    return Condition(*fields)


def _width(t: Tensor) -> int:
    return t.shape[1] if t.ndim > 1 else 0


def _pad_left(t: Tensor, width: int) -> Tensor:
    if _width(t) == width:
        return t
    pad = t.new_zeros(t.shape[0], width - t.shape[1], *t.shape[2:])
    return torch.cat([pad, t], dim=1)
