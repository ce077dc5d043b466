"""Condition: what an image is generated from; what makes one of a batch of data, and how a generator
reads it.

`Condition` is the data: a class label, or caption features. A `Conditioner` makes it of a batch (of
captions: `tessellar.text`). A generator's `Conditioning` knows which condition stands for none, and
how often training takes that one (classifier-free guidance, arXiv 2207.12598).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.configured import Configured
from tessellar.protocol.ranges import check_number


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
        present = [value for value in values if value is not None]
        widest = max(map(_width, present), default=0)
        padded = [pad_left(value, widest) for value in present]
        fields.append(torch.cat(padded) if present else None)
    return Condition(*fields)


def _width(t: Tensor) -> int:
    return t.shape[1] if t.ndim > 1 else 0


def pad_left(t: Tensor, width: int) -> Tensor:
    if _width(t) == width:
        return t
    pad = t.new_zeros(t.shape[0], width - t.shape[1], *t.shape[2:])
    return torch.cat([pad, t], dim=1)


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
        """Condition of int64 labels [B]; raises UserError for a label outside [0, num_classes).

        On an accelerator they are not looked at, since the host would wait for it at each step: a
        run compares the classes of its data before it begins.
        """
        on_host = labels.device.type == "cpu"
        bad = labels[(labels < 0) | (labels >= self.num_classes)] if on_host else labels[:0]
        if len(bad):
            raise UserError(
                f"class id {int(bad[0])} does not exist; classes are 0 to {self.num_classes - 1}"
            )
        return Condition(ids=labels.to(torch.int64))


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
