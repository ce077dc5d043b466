"""A part of a set, chosen at random once and for all: an even stride would fall in step with labels
that go round.
"""

import numpy as np
import torch
from torch import Tensor

SEED = 0


def subset(total: int, count: int) -> Tensor:
    """`count` of the places 0 .. total - 1, ascending, int64; always the same ones (numpy's
    RandomState is frozen).
    """
    if count >= total:
        return torch.arange(total)
    return torch.from_numpy(np.sort(np.random.RandomState(SEED).permutation(total)[:count]))
