"""Facts of a run that are said before it begins: tokens, positions, parameters, memory, operations
an image.
"""

from typing import NamedTuple

from torch import nn

BYTES = 4
STATES = 5
"""Weights, gradients, two moments of AdamW, averaged weights: float32 numbers a trained parameter."""


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of those that are trained and of those that are frozen."""
    trained = 0
    frozen = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    return trained, frozen


class Facts(NamedTuple):
    """What a run will cost by its sizes alone; positions and FLOPs are None for a tokenizer."""

    trained: int
    frozen: int
    tokens: int
    entities: int | None = None
    positions: int | None = None
    flops: int | None = None

    @property
    def memory(self) -> int:
        """Bytes without activations."""
        return BYTES * (STATES * self.trained + self.frozen)

    def __str__(self) -> str:
        told = [f"{self.tokens:,} tokens an image"]
        if self.positions is not None and self.flops is not None:
            told[0] += f" in {self.entities:,} entities"
            told.append(f"{self.positions:,} positions")
            told.append(f"about {self.flops / 1e9:,.2f} GFLOP an image, forward and backward")
        told.append(f"{self.memory / 1e9:,.2f} GB without activations")
        return "; ".join(told)
