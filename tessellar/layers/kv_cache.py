"""Keys and values of what was read so far: one preallocated buffer with lengths, roll-back and
visibility by number.

Masks are data: every slot carries a block number and a query sees the filled slots whose block is
at most its own, and itself. Causal, level, scale and entity masks, padding (`NEVER`), cached and
uncached passes all follow from that rule. Block numbers and lengths stay on the CPU, so nothing
here waits for an accelerator.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 2**40  # block of padding: no real query reaches it


class Slots(NamedTuple):
    """Where the keys of one pass go and what its queries see."""

    index: Tensor  # [R, n] slots
    start: int | None  # first slot where it is the same for all rows
    stop: int  # slots from here on are not attended to
    mask: (
        Tensor | None
    )  # [R or 1, 1, n, stop], True = visible; None: everything visible, or `is_causal`
    is_causal: bool


class KVCache:
    """Buffer [layers, 2, R, heads, capacity, dim] with per-row lengths.

    A pass is `reserve`, one `write` a layer, then `commit`; without the commit the next pass
    overwrites it.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros, not empty: a hidden slot has weight 0, but 0 times a stray NaN would be NaN.
        self.data = torch.zeros(layers, 2, rows, heads, capacity, dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.block = torch.zeros(rows, capacity, dtype=torch.int64)
        self._reserved = 0

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    def reserve(self, block: Tensor) -> Slots:
        """Slots behind each row's length for n queries with block numbers `block` [R or 1, n].

        Raises ValueError where the buffer is too small.
        """
        n = block.shape[-1]
        index = self.lengths[:, None] + torch.arange(n)
        stop = int(self.lengths.max()) + n
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {stop} are needed")
        self.block.scatter_(1, index, block.expand(len(index), n))
        self._reserved = n
        start = int(self.lengths[0]) if bool((self.lengths == self.lengths[0]).all()) else None
        mask = self._visible(block, index, stop)
        is_causal = (
            start == 0
            and n == stop
            and bool((mask == torch.ones(n, n, dtype=torch.bool).tril()).all())
        )
        everything = bool(mask.all())
        device = self.data.device
        return Slots(
            index.to(device),
            start,
            stop,
            None if is_causal or everything else mask.to(device),
            is_causal and n > 1,
        )

    def _visible(self, block: Tensor, index: Tensor, stop: int) -> Tensor:
        slots = torch.arange(stop)
        filled = slots < self.lengths[:, None] + index.shape[1]
        seen = (self.block[:, None, :stop] <= block[..., None]) & filled[:, None]
        return (seen | (slots == index[..., None]))[:, None]

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [R, H, n, D] of this pass; returns views of the keys and values to attend to
        [R, H, stop, D].
        """
        keys, values = self.data[layer]
        if slots.start is not None:
            keys[:, :, slots.start : slots.stop] = k
            values[:, :, slots.start : slots.stop] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            keys.transpose(1, 2)[rows, slots.index] = k.transpose(1, 2).to(keys.dtype)
            values.transpose(1, 2)[rows, slots.index] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : slots.stop], values[:, :, : slots.stop]

    def commit(self) -> None:
        """Keep what the last pass wrote."""
        self.lengths = self.lengths + self._reserved
        self._reserved = 0

    def truncate(self, lengths: Tensor) -> None:
        """Roll each row back to `lengths` [R]; raises ValueError where a row would grow."""
        if bool((lengths > self.lengths).any()):
            raise ValueError(
                f"cannot roll back to {lengths.tolist()}: the rows hold {self.lengths.tolist()}"
            )
        self.lengths = lengths.clone()

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of copies of `rows` [r]: fork, reorder, drop."""
        chosen = object.__new__(KVCache)
        chosen.data = self.data[:, :, rows.to(self.data.device)]
        chosen.lengths = self.lengths[rows]
        chosen.block = self.block[rows]
        chosen._reserved = 0
        return chosen


class NoCache:
    """The same interface over the keys of one pass only: training and scoring run the decoding
    code.
    """

    lengths = torch.zeros(1, dtype=torch.int64)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reserve(self, block: Tensor) -> Slots:
        n = block.shape[-1]
        index = torch.arange(n)[None]
        if (
            bool((block == block[:1]).all())
            and bool((block[0].diff() > 0).all())
            and int(block[0, -1]) < NEVER
        ):
            return Slots(index, 0, n, None, n > 1)
        mask = (block[:, None, :] <= block[..., None]) | torch.eye(n, dtype=torch.bool)
        return Slots(
            index, 0, n, None if bool(mask.all()) else mask[:, None].to(self.device), False
        )

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def commit(self) -> None:
        pass
