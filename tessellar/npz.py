"""npz files: one array as a stream of rows in constant memory, small arrays at once, and atomic
writing. No pickle.

They are zip archives: the CRC of an array is compared when its last byte is read. What a header
claims is compared with the size of the file's part before memory is taken for it.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from tessellar.errors import UserError, writing
from tessellar.npy import ArrayHeader, read_header
from tessellar.tensor_files import open_archive, require_file

# Bytes of an array that is read at once: features of 10,000 images, a covariance.
MAX_ARRAY = 4 << 30
MAX_ROW = 1 << 28


class Rows(NamedTuple):
    """An open array: `shape` and `dtype` from its header, `stream` at its first value."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path

    def read(self, count: int) -> np.ndarray:
        """The next `count` rows; raises UserError where the file is damaged."""
        size = count * prod(self.shape[1:]) * self.dtype.itemsize
        content = _read(self.stream, size, self.path)
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:]).copy()


def names(path: Path) -> set[str]:
    """Names of the arrays in an npz file; raises UserError if it is none."""
    require_file(path)
    with _readable(path, "is not an npz file"), open_archive(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


@contextmanager
def open_rows(path: Path, name: str) -> Iterator[Rows]:
    """The array `name` of an npz file as a stream of rows; raises UserError for a damaged or
    foreign file.
    """
    if name not in names(path):
        raise UserError(
            f"{path} holds no array {name!r}; it holds {', '.join(sorted(names(path)))[:200]}"
        )
    with _readable(path):
        archive = open_archive(path)
    with archive:
        with _readable(path):
            stream = archive.open(f"{name}.npy")
            header = _read_header(archive, stream, name)
            row = prod(header.shape[1:]) * header.dtype.itemsize
            if header.fortran or row > MAX_ROW:
                raise ValueError(f"{name} is not an array of rows in C order of at most 256 MB")
        with stream:
            yield Rows(stream, header.shape, header.dtype, path)


def read_arrays(path: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Small arrays by our name, each under the first of its possible names that the file holds;
    others are left out.
    """
    present = names(path)
    arrays = {}
    with _readable(path), open_archive(path) as archive:
        for ours, theirs in wanted.items():
            for name in theirs:
                if name in present:
                    arrays[ours] = _read_array(archive, name, path)
                    break
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        header = _read_header(archive, stream, name)
        if header.size > MAX_ARRAY:
            raise ValueError(f"{name} has {header.size} bytes, more than {MAX_ARRAY}")
        content = _read(stream, header.size, path)
    values = np.frombuffer(content, header.dtype)
    order = "F" if header.fortran else "C"
    return values.reshape(header.shape, order=order).copy()


def _read_header(archive: zipfile.ZipFile, stream: IO[bytes], name: str) -> ArrayHeader:
    """Raises ValueError for an array of objects, and where shape and size of the part differ."""
    return read_header(stream, name, archive.getinfo(f"{name}.npy").file_size)


def _read(stream: IO[bytes], size: int, path: Path) -> bytes:
    """The next bytes, and at the end of the part the comparison of its CRC."""
    with _readable(path):
        content = stream.read(size)
        if len(content) < size:
            raise EOFError("an array ends early")
        return content


@contextmanager
def _readable(path: Path, problem: str = "is truncated or not readable") -> Iterator[None]:
    """Raise UserError for whatever zipfile and numpy raise on damaged files."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError of an encrypted one, ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} {problem} ({reason})") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz so that readers see either nothing or the whole file."""
    # In the same folder, so that the rename stays on one file system and is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, unfinished=temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
