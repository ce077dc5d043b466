"""IDX, the file format of MNIST and its successors: a magic number, the sizes, then bytes; plain or
gzipped.

Magic: 0, 0, type (8 = unsigned byte), number of axes; then each size as a big-endian 32-bit
integer.
"""

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from tessellar.errors import UserError

UNSIGNED_BYTE = 8
MOST_UNPACKED = 1032  # bytes that one byte of deflated data can stand for


def find_idx(root: Path, name: str) -> Path:
    """`root/name` or `root/name.gz`; raises UserError that says what to put where."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"{root / name} is missing (also as .gz): put the data set's IDX files there, or name their folder"
    )


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The array of an IDX file, uint8 with `axes` axes; raises UserError for any other or
    incomplete content.

    No more is read than the header claims, and it may claim no more than the file can hold: gzip
    makes a kilobyte of a megabyte at most.
    """
    packed = path.suffix == ".gz"
    largest = path.stat().st_size * (MOST_UNPACKED if packed else 1)
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            shape = _read_shape(file, axes, path)
            size = prod(shape)
            if size > largest:
                raise UserError(
                    f"{path} is too short for its header, which claims {size} bytes {shape}: fetch it again"
                )
            content = file.read(size)
            is_longer = len(file.read(1)) > 0  # at its end gzip compares the checksum
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as {'a gzip' if packed else 'an IDX'} file ({error}): fetch it again"
        ) from error
    if len(content) < size or is_longer:
        header = 4 + 4 * axes
        held = (
            f"{header + size + 1} bytes or more" if is_longer else f"{header + len(content)} bytes"
        )
        raise UserError(
            f"{path} holds {held}; its header {shape} needs {header + size}: fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_shape(file: IO[bytes] | gzip.GzipFile, axes: int, path: Path) -> tuple[int, ...]:
    magic = bytes([0, 0, UNSIGNED_BYTE, axes])
    first = file.read(4)
    if first != magic:
        raise UserError(
            f"{path} begins with {first.hex()}; an IDX file of {axes} axes begins with {magic.hex()}"
        )
    sides = file.read(4 * axes)
    if len(sides) < 4 * axes:
        raise UserError(f"{path} ends within its header, which needs {4 + 4 * axes} bytes")
    return tuple(int.from_bytes(sides[i : i + 4], "big") for i in range(0, 4 * axes, 4))
