"""Bytes that tensors hold, exactly and on any device, the CPU included: what operations return and
what is still alive of it. Scratch memory inside of one operation is not seen.
"""

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts within it; `most` is the peak of `now`, tensors of the shapes `besides` left out."""

    def __init__(self, besides: Collection[tuple[int, ...]] = ()) -> None:
        super().__init__()
        self.besides = set(besides)
        self.now = 0
        self.most = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) not in self.besides:
                self._take(tensor.untyped_storage())
        return made

    def _take(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if not place or place in self._held:
            return
        self._held[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, place)

    def _free(self, place: int) -> None:
        self.now -= self._held.pop(place, 0)
