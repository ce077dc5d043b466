"""Names of files in one buffer.

A tuple of 1.28 million texts takes 130 MB, and each process that reads one of them writes its
reference count, so that a worker's copy-on-write memory becomes a copy. Bytes with the places where
each name ends take 60 MB, are never written, and as tensors they lie in shared memory for workers
that are not forked.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from torch import Tensor


class Names(Sequence[str]):
    """An unchangeable sequence of texts: paths as the system gives them, also such as are no UTF-8."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = list(map(os.fsencode, names))
        ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)
        self._take(torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), ends)

    def _take(self, content: Tensor, ends: np.ndarray) -> None:
        self._content = content  # uint8, all names one after the other
        self._ends = torch.from_numpy(
            ends
        )  # int64 [N + 1]: name i lies from ends[i] to ends[i + 1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "Names": ...

    def __getitem__(self, place: "int | slice") -> "str | Names":
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        place = range(len(self))[place]  # raises IndexError past the end
        ends = self._ends.numpy()
        return os.fsdecode(self._content.numpy()[ends[place] : ends[place + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        content = self._content.numpy().tobytes()
        start = 0
        for end in self._ends[1:].tolist():
            yield os.fsdecode(content[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same texts."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: "Sequence[int] | np.ndarray") -> "Names":
        """The names at some places, in their order; without a text for each of them."""
        chosen = np.asarray(places, np.int64)
        ends = self._ends.numpy()
        starts = ends[chosen]
        lengths = ends[chosen + 1] - starts
        new_ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
        # Byte b of the result comes from where its name began, as far on as it lies in its name.
        source = np.repeat(starts - new_ends[:-1], lengths) + np.arange(new_ends[-1])
        content = self._content.numpy()[source] if len(source) else np.zeros(1, np.uint8)
        made = Names.__new__(Names)
        made._take(torch.from_numpy(content), new_ends)
        return made
