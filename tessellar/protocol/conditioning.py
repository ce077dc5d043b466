"""Conditioning: what a generator reads as its condition, which condition stands for none, and how
often training takes that one.
"""

from abc import ABC, abstractmethod

import torch

from tessellar.protocol.condition import Condition
from tessellar.protocol.conditioner import ClassConditioner, Conditioner
from tessellar.protocol.ranges import check_number


class Conditioning(ABC):
    """The one place of a generator that knows its conditions; a module where it has weights or
    buffers of its own.

    `dropout` is the probability with which training replaces a sample's condition by the null
    condition; raises UserError where it is none.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        check_number("condition_dropout", dropout, least=0, most=1)
        self.dropout = dropout

    @abstractmethod
    def conditioner(self) -> Conditioner:
        """What turns a batch of data into this condition."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of every row."""

    def drop(self, condition: Condition) -> Condition:
        """Each row null with probability `dropout`, drawn anew (arXiv 2207.12598)."""
        if self.dropout == 0:
            return condition
        device = next(t.device for t in condition if t is not None)
        keep = torch.rand(condition.batch, device=device) >= self.dropout
        return condition.where(keep, self.null(condition))


class ClassConditioning(Conditioning):
    """One of `num_classes` labels; `null_class` (default: the number of classes) stands for none of
    them.
    """

    def __init__(
        self, num_classes: int, null_class: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__(dropout)
        self.num_classes = num_classes
        self.null_class = num_classes if null_class is None else null_class

    def conditioner(self) -> Conditioner:
        return ClassConditioner(self.num_classes)

    def null(self, condition: Condition) -> Condition:
        assert condition.ids is not None
        return Condition(ids=torch.full_like(condition.ids, self.null_class))
