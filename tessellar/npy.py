"""The header of an array in numpy's format, read before memory is taken for what it claims.

numpy itself reads a header of up to four gigabytes before it refuses it, and makes the whole array
before it looks for its values.
"""

import io
from math import prod
from typing import IO, NamedTuple

import numpy as np

MAX_HEADER = 10_000  # bytes, numpy's own limit for headers that are not trusted
MAX_AXES = 8
LENGTHS = {(1, 0): 2, (2, 0): 4}  # bytes that the header's length takes
READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArrayHeader(NamedTuple):
    """Shape, order and type of an array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], name: str, size: int) -> ArrayHeader:
    """The header of the array at the begin of `stream`, which has `size` bytes in all.

    Raises ValueError for an array of objects, and where the values are not the rest of the stream.
    """
    version = np.lib.format.read_magic(stream)
    if version not in LENGTHS:
        raise ValueError(f"{name} is of version {version} of the format")
    length = stream.read(LENGTHS[version])
    claimed = int.from_bytes(length, "little")
    if claimed > MAX_HEADER:
        raise ValueError(f"{name} has a header of {claimed} bytes")
    text = stream.read(claimed)
    header = ArrayHeader(*READERS[version](io.BytesIO(length + text)))
    if header.dtype.hasobject or len(header.shape) > MAX_AXES or min(header.shape, default=0) < 0:
        raise ValueError(f"{name} is no plain array")
    magic = 8
    there = size - magic - len(length) - len(text)
    if header.size != there:
        raise ValueError(f"{name} has shape {header.shape} of {header.dtype}, but {there} bytes")
    return header
