"""Work: how many positions a generator's sequence has, and the multiply-accumulates (MACs) of one
image in training.

Counted from sizes alone, so that it can be said before anything is allocated: a linear layer takes
as many MACs as it has weights at each position that it sees, causal attention n (n + 1) D of scores
and mixed values a layer.
"""

from typing import NamedTuple

from torch import nn


class Work(NamedTuple):
    """Positions of the sequence; MACs of a forward pass over one image: in the blocks, and around
    them.
    """

    positions: int
    backbone: int
    around: int

    @property
    def training_flops(self) -> int:
        """Forward and backward: three times two operations a MAC."""
        return 6 * (self.backbone + self.around)


def linear_macs(module: nn.Module | None) -> int:
    """MACs of all linear layers inside at one position."""
    if module is None:
        return 0
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def causal_attention_macs(depth: int, width: int, positions: int) -> int:
    """Scores and mixed values of `depth` layers, each query with the keys up to its own."""
    return depth * width * positions * (positions + 1)
