"""npz files: one array as a stream of rows in constant memory, small arrays at once, and atomic
writing. No pickle.

They are zip archives: the CRC of an array is compared when its last byte is read.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from tessellar.errors import UserError, writing
from tessellar.tensor_files import require_file

_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError)


class Rows(NamedTuple):
    """An open array: `shape` and `dtype` from its header, `stream` at its first value."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, count: int) -> np.ndarray:
        """The next `count` rows."""
        # A stream is read in bytes: rows times values of a row times bytes of a value.
        size = count * int(np.prod(self.shape[1:])) * self.dtype.itemsize
        content = self.stream.read(size)
        if len(content) < size:
            raise EOFError("the array ends early")
        # A copy, since a view of bytes cannot be written to, which torch warns of.
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:]).copy()


def names(path: Path) -> set[str]:
    """Names of the arrays in an npz file; raises UserError if it is none."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _UNREADABLE as error:
        raise UserError(f"{path} is not an npz file ({error})") from error


@contextmanager
def open_rows(path: Path, name: str) -> Iterator[Rows]:
    """The array `name` of an npz file as a stream of rows; raises UserError for a damaged or
    foreign file.
    """
    if name not in names(path):
        raise UserError(
            f"{path} holds no array {name!r}; it holds {', '.join(sorted(names(path)))}"
        )
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            # numpy's own loader would read the whole array; only its header is read here.
            # Version 3 has names in UTF-8, which no plain array has: a KeyError, so a UserError.
            headers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            version = np.lib.format.read_magic(stream)
            shape, fortran, dtype = headers[version](stream)
            # Objects are pickled, which may run code; rows lie together in C order only.
            if dtype.hasobject or fortran:
                raise ValueError(f"{name} is not a plain array in C order")
            yield Rows(stream, shape, dtype)
    except _UNREADABLE as error:
        raise UserError(f"{path} is truncated or not readable ({error})") from error


def read_arrays(path: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Small arrays by our name, each under the first of its possible names that the file holds;
    others are left out.
    """
    present = names(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {}
            for ours, theirs in wanted.items():
                for name in theirs:
                    if name in present:
                        found[ours] = archive[name]
                        break
            return found
    except _UNREADABLE as error:
        raise UserError(f"{path} is truncated or not readable ({error})") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz so that readers see either nothing or the whole file."""
    # In the same folder, so that the rename stays on one file system and is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, unfinished=temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
