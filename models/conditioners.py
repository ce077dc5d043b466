"""Conditioners: from a batch of data to the condition that a generator reads."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tessellar.construct import Configured
from tessellar.errors import UserError
from tessellar.models.condition import Condition


class Conditioner(Configured, nn.Module, ABC):
    """Reads what it needs from a batch; `labels` tells whether it is class labels."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> Condition:
        """Condition of the batch's B samples."""


class ClassConditioner(Conditioner):
    """Class labels in [0, num_classes)."""

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
            raise UserError(f"class id {int(bad[0])} does not exist; classes are 0 to {self.num_classes - 1}")
        return Condition(ids=labels.to(torch.int64))


class FeatureConditioner(Conditioner):
    """Caption features [B, P, D] that the data set gives, left-padded, with `valid` [B, P]."""

    def forward(self, batch: dict[str, Any]) -> Condition:
        if "caption_features" not in batch or "caption_valid" not in batch:
            raise UserError("the data set gives no caption_features and caption_valid, which this generator reads")
        return Condition(valid=batch["caption_valid"].bool(), features=batch["caption_features"])
