"""Conditioning: what a generator reads as its condition, and which condition stands for none."""

from abc import ABC, abstractmethod

import torch

from tessellar.protocol.condition import Condition
from tessellar.protocol.conditioner import ClassConditioner, Conditioner


class Conditioning(ABC):
    """The one place of a generator that knows its conditions; a module where it has weights or
    buffers of its own.
    """

    @abstractmethod
    def conditioner(self) -> Conditioner:
        """What turns a batch of data into this condition."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of every row."""


class ClassConditioning(Conditioning):
    """One of `num_classes` labels; `null_class` (default: the number of classes) stands for none of
    them.
    """

    def __init__(self, num_classes: int, null_class: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.null_class = num_classes if null_class is None else null_class

    def conditioner(self) -> Conditioner:
        return ClassConditioner(self.num_classes)

    def null(self, condition: Condition) -> Condition:
        assert condition.ids is not None
        return Condition(ids=torch.full_like(condition.ids, self.null_class))
