"""Where arithmetic must not be rounded to bfloat16 or float16."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64 (recorded gradients are replayed in float64)."""
    return x if x.dtype == torch.float64 else x.float()
