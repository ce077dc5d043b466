"""Keys and values of what was read so far: one preallocated buffer with lengths, roll-back and
visibility by number.

Masks are data: every slot carries a block number and a query sees the filled slots whose block is
at most its own, and itself. Causal, level, scale and entity masks, padding (`NEVER`), cached and
uncached passes all follow from that rule. Block numbers and lengths stay on the CPU, so nothing
here waits for an accelerator; or they lie on the accelerator and nothing is read from them
(`KVCache.fixed`). `PlacedCache` holds inputs of any places, for windows that are no run of them.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NEVER = 2**40  # block of padding: no real query reaches it


class Slots(NamedTuple):
    """Where the keys of one pass go and what its queries see."""

    index: Tensor  # [R, n] slots
    start: int | None  # first slot where it is the same for all rows
    stop: int  # slots from here on are not attended to
    # [R or 1, 1, n, stop], True = visible, or FlexAttention's; None: all visible, or `is_causal`
    mask: "Tensor | BlockMask | None"
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
        self.is_fixed = False  # lengths and blocks lie with the data, and shapes depend on neither
        self.attended: int | None = None  # where fixed: slots that a pass attends to; None: all
        self._rows_alike = True  # every pass so far was the same for all rows

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    def reserve(self, block: Tensor) -> Slots:
        """Slots behind each row's length for n queries with block numbers `block` [R or 1, n].

        Raises ValueError where the buffer is too small.
        """
        n = block.shape[-1]
        index = self.lengths[:, None] + torch.arange(n, device=self.lengths.device)
        if self.is_fixed:
            self.block.scatter_(1, index, block.expand(len(index), n))
            self._reserved = n
            stop = self.capacity if self.attended is None else self.attended
            return Slots(index, None, stop, self._visible(block, index, stop), False)
        stop = int(self.lengths.max()) + n
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {stop} are needed")
        self.block.scatter_(1, index, block.expand(len(index), n))
        self._reserved = n
        start = int(self.lengths[0]) if bool((self.lengths == self.lengths[0]).all()) else None
        self._rows_alike &= start is not None and len(block) == 1
        # One row of mask where all rows are alike.
        mask = self._visible(block, index[:1] if self._rows_alike else index, stop)
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
        rows = len(index)
        slots = torch.arange(stop, device=index.device)
        filled = slots < self.lengths[:rows, None] + index.shape[1]
        seen = (self.block[:rows, None, :stop] <= block[..., None]) & filled[:, None]
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
            _put(keys, slots.index, k)
            _put(values, slots.index, v)
        return keys[:, :, : slots.stop], values[:, :, : slots.stop]

    def commit(self) -> None:
        """Keep what the last pass wrote."""
        if self.is_fixed:
            self.lengths.add_(self._reserved)  # in place: a captured step goes on from there
        else:
            self.lengths = self.lengths + self._reserved
        self._reserved = 0

    def fixed(self) -> "KVCache":
        """The same cache with lengths and blocks where its data lies: nothing is read on the host.

        A pass then attends to the whole buffer through a mask, and nobody notices where it is full.
        """
        device = self.data.device
        made = self._of(self.data, self.lengths.to(device).clone(), self.block.to(device).clone())
        made.is_fixed = True
        return made

    def _as(self, other: "KVCache") -> "KVCache":
        """This cache with the switches of another one."""
        self.is_fixed = other.is_fixed
        self.attended = other.attended
        self._rows_alike = other._rows_alike
        return self

    def truncate(self, lengths: Tensor) -> None:
        """Roll each row back to `lengths` [R]; raises ValueError where a row would grow."""
        if self.is_fixed:
            self.lengths.copy_(lengths)
            return
        if bool((lengths > self.lengths).any()):
            raise ValueError(
                f"cannot roll back to {lengths.tolist()}: the rows hold {self.lengths.tolist()}"
            )
        self.lengths = lengths.clone()

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of copies of `rows` [r]: fork, reorder, drop."""
        rows = rows.to(self.data.device)
        there = rows.to(self.lengths.device)
        return self._of(self.data[:, :, rows], self.lengths[there], self.block[there])._as(self)

    @classmethod
    def _of(cls, data: Tensor, lengths: Tensor, block: Tensor) -> "KVCache":
        made = object.__new__(cls)
        made.data = data
        made.lengths = lengths
        made.block = block
        made._reserved = 0
        made.is_fixed = False
        made.attended = None
        made._rows_alike = False
        return made


class PlacedCache:
    """A cache whose slot s holds the input of place s, and in which any set of places may be there.

    A pass is `reserve`, one `write` a layer, then `keep`, which says what of it stays. Everything
    lies where the data lies. The slot behind the last place takes what padding writes.
    """

    def __init__(self, data: Tensor, kept: Tensor, block: Tensor) -> None:
        self.data = data  # [layers, 2, R, heads, capacity + 1, dim]
        self.kept = kept  # [R, capacity + 1], never the last
        self.block = block  # [R, capacity + 1]
        self._window = torch.zeros(len(kept), 0, dtype=torch.int64, device=kept.device)

    @classmethod
    def after(cls, cache: KVCache) -> "PlacedCache":
        """With what `cache` read so far, from place 0 on."""
        data = F.pad(cache.data, (0, 0, 0, 1))
        places = torch.arange(cache.capacity + 1, device=data.device)
        kept = places < cache.lengths.to(data.device)[:, None]
        return cls(data, kept, F.pad(cache.block.to(data.device), (0, 1)))

    @property
    def capacity(self) -> int:
        return self.kept.shape[1] - 1

    def reserve(self, place: Tensor, group: Tensor, block: Tensor) -> Slots:
        """Slots of inputs at `place` [R, n] (below 0: padding), with visibility numbers `block`.

        A query sees kept slots and inputs of this pass whose block is at most its own; of the pass
        those of `group` [R, n] 0 and of its own group, and itself. What is read again replaces what
        was kept.
        """
        device = self.kept.device
        group = group.to(device)
        block = block.to(device)
        is_padding = (place < 0).to(device)
        index = torch.where(is_padding, self.capacity, place.to(device))
        together = (group[:, None] == 0) | (group[:, None] == group[..., None])
        of_pass = (block[:, None] <= block[..., None]) & together
        of_pass = of_pass | torch.eye(index.shape[1], dtype=torch.bool, device=device)
        seen = self.kept[:, None] & (self.block[:, None] <= block[..., None])
        seen = seen.scatter(2, index[:, None].expand_as(of_pass), of_pass)
        seen[..., -1] = is_padding  # or it would have no key at all
        self.block = self.block.scatter(1, index, block)
        self._window = index
        return Slots(index, None, self.capacity + 1, seen[:, None], False)

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [R, H, n, D] of this pass; returns all keys and values."""
        keys, values = self.data[layer]
        _put(keys, slots.index, k)
        _put(values, slots.index, v)
        return keys, values

    def keep(self, keep: Tensor) -> None:
        """What of the last pass stays: `keep` [R, n]; the rest of its places is empty."""
        self.kept = self.kept.scatter(1, self._window, keep.to(self.kept.device))
        self.kept[:, -1] = False
        self._window = self._window[:, :0]

    def reveal(self) -> None:
        """Places that nobody read are seen from now on, with keys and values of 0."""
        places = torch.arange(self.capacity + 1, device=self.kept.device)
        self.block = torch.where(self.kept, self.block, places)
        self.kept = self.kept | (places < self.capacity)

    def commit(self) -> None:
        """Nothing stays unless `keep` says so."""

    def select(self, rows: Tensor) -> "PlacedCache":
        """A cache of copies of `rows` [r]."""
        rows = rows.to(self.kept.device)
        return PlacedCache(self.data[:, :, rows], self.kept[rows], self.block[rows])


def _put(buffer: Tensor, index: Tensor, new: Tensor) -> None:
    """Write `new` [R, H, n, D] into slots `index` [R, n] of `buffer` [R, H, S, D]."""
    rows = torch.arange(len(new), device=new.device)[:, None]
    buffer.transpose(1, 2)[rows, index] = new.transpose(1, 2).to(buffer.dtype)


@lru_cache(maxsize=8)
def flex_mask(
    numbers: tuple[int, ...], device: torch.device, groups: tuple[int, ...] | None = None
) -> "BlockMask":
    """FlexAttention's mask of visibility numbers: of a generator the same at every step, so it is
    kept. What has a group, at least 0, is seen from within it alone.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    block = torch.tensor(numbers, device=device)

    group = torch.tensor(groups or [-1] * len(numbers), device=device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        open_to_it = (group[key] < 0) | (group[key] == group[query])
        return ((block[key] <= block[query]) & open_to_it) | (query == key)

    return create_block_mask(visible, None, None, len(block), len(block), device=str(device))


class NoCache:
    """The same interface over the keys of one pass only: training and scoring run the decoding
    code.

    With `flex` the mask of rows that are alike is FlexAttention's, which skips the blocks that are
    hidden and stores no table; the dense one is its reference.
    """

    lengths = torch.zeros(1, dtype=torch.int64)

    def __init__(self, device: torch.device, flex: bool = False) -> None:
        self.device = device
        self.flex = flex

    def reserve(self, block: Tensor) -> Slots:
        n = block.shape[-1]
        index = torch.arange(n)[None]
        if (
            bool((block == block[:1]).all())
            and bool((block[0].diff() > 0).all())
            and int(block[0, -1]) < NEVER
        ):
            return Slots(index, 0, n, None, n > 1)
        if self.flex and len(block) == 1:
            numbers = tuple(block[0].tolist())
            return Slots(index, 0, n, flex_mask(numbers, self.device), False)
        mask = (block[:, None, :] <= block[..., None]) | torch.eye(n, dtype=torch.bool)
        return Slots(
            index, 0, n, None if bool(mask.all()) else mask[:, None].to(self.device), False
        )

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def commit(self) -> None:
        pass
