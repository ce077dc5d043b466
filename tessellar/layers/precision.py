"""Where arithmetic must not be rounded to bfloat16 or float16."""

from collections.abc import Callable
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64 (recorded gradients are replayed in float64)."""
    return x if x.dtype == torch.float64 else x.float()


@cache
def computes_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 matrices itself: others emulate that,
    some fifty times slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ExactTables(nn.Module):
    """A module whose tables (buffers that are no part of a checkpoint) are never rounded below
    float32.

    A cast of the module to bfloat16 leaves them as they are, so that a cast back gives what was
    there: no checkpoint could restore them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tables = {name: self._buffers[name] for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            cast = self._buffers[name]
            if table is None or cast is None or not table.is_floating_point():
                continue
            if cast.dtype.itemsize < torch.float32.itemsize:
                self._buffers[name] = table.to(cast.device)
        return self
