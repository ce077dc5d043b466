"""IDX, the file format of MNIST and its successors: a magic number, the sizes, then bytes; plain or
gzipped.

Magic: 0, 0, type (8 = unsigned byte), number of axes; then each size as a big-endian 32-bit
integer.
"""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from tessellar.errors import UserError

UNSIGNED_BYTE = 8


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
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as a gzip file ({error}): fetch it again"
        ) from error
    magic = bytes([0, 0, UNSIGNED_BYTE, axes])
    if raw[:4] != magic:
        raise UserError(
            f"{path} begins with {raw[:4].hex()}; an IDX file of {axes} axes begins with {magic.hex()}"
        )
    header = 4 + 4 * axes
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4))
    if len(raw) != header + prod(shape):
        raise UserError(
            f"{path} holds {len(raw)} bytes; its header {shape} needs {header + prod(shape)}: fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
