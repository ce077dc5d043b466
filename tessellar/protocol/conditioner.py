"""Conditioners: from a batch of data to the condition that a generator reads; class labels here,
captions in `text`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.configured import Configured


class Conditioner(Configured, nn.Module, ABC):
    """Reads what it needs from a batch.

    `gives` names what its conditions hold, where other conditioners give the same; a generator
    reads one kind. `meaning` are the constructor arguments that decide what a condition means to a
    trained generator, `free` those that never matter to it.
    """

    gives: ClassVar[str] = ""
    meaning: ClassVar[tuple[str, ...]] = ()
    free: ClassVar[tuple[str, ...]] = ()

    @property
    def is_prepared(self) -> bool:
        """Whether nothing is left to learn from a run's captions."""
        return True

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> Condition:
        """Condition of the batch's B samples."""


class ClassConditioner(Conditioner):
    """Class labels in [0, num_classes)."""

    gives = "class ids"
    meaning = ("num_classes",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, batch: dict[str, Any]) -> Condition:
        if "label" not in batch:
            raise UserError("the data set gives no labels, but the generator is class-conditional")
        return self.of_labels(batch["label"])

    def of_labels(self, labels: Tensor) -> Condition:
        """Condition of int64 labels [B]; raises UserError for a label outside [0, num_classes)."""
        bad = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(bad):
            raise UserError(
                f"class id {int(bad[0])} does not exist; classes are 0 to {self.num_classes - 1}"
            )
        return Condition(ids=labels.to(torch.int64))
