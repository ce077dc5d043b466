"""Reading weight files safely, and putting them into modules strictly.

Two kinds of files are read: safetensors, and torch pickles with `weights_only=True` (official
training checkpoints also hold an `argparse.Namespace`, which is allowed by name). Anything else in
a pickle is code, and is refused.

Neither library compares checksums, so a flipped bit would pass as a weight. Torch files are zip
archives with a CRC of each tensor, which is compared before they are opened: one more sequential
read, which leaves the file in the system's cache for the read that follows. Our safetensors files
carry a SHA-256 in their metadata, which is compared with the tensors as they are read, in the same
pass over the file.
"""

import argparse
import hashlib
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import ne
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessellar.errors import UserError, writing

log = logging.getLogger(__name__)


SHOWN = 5


CHECKSUM = "tessellar.sha256"  # key of a safetensors file's metadata


REPEATED = 1 << 26  # bytes that a tensor may have beyond what is stored of it


UNFOLDED = 20  # how many times its own size the parts of an archive may have


ZIP = b"PK\x03\x04"  # the first bytes of a torch file; older ones are bare pickles


class Weights(dict[str, Tensor]):
    """A state dict that answers a key it lacks with a UserError: it holds other weights than its
    reader expects.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__(tensors)
        self.where = where

    def __missing__(self, key: str) -> Tensor:
        raise UserError(f"{self.where} has no {key}: it holds other weights than are read here")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises UserError for a missing or damaged one.

    The checksum is compared where the file carries one (`say_unchecked` is for those without).
    """
    require_file(path)
    try:
        with safe_open(str(path), "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except Exception as error:
        # A type that torch lacks is a KeyError, a large header a MemoryError.
        raise UserError(
            f"{path} is truncated or not a safetensors file ({_one_line(error)})"
        ) from error
    damaged_name = False
    for key in metadata:
        if len(key) == len(CHECKSUM):  # with one character changed, as a flipped bit does
            damaged_name |= sum(map(ne, CHECKSUM, key)) == 1
    if damaged_name or (CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors, metadata)):
        raise UserError(
            f"{path} is damaged: its tensors do not have its checksum; copy or download it again"
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, without reading its tensors; raises UserError for a missing
    or damaged one.
    """
    require_file(path)
    try:
        with safe_open(str(path), "pt", device="cpu") as file:
            return file.metadata() or {}
    except Exception as error:  # as above
        raise UserError(
            f"{path} is truncated or not a safetensors file ({_one_line(error)})"
        ) from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file with its checksum; `tensors` are contiguous, on the CPU, each with memory
    of its own.
    """
    described = {"format": "pt", **(metadata or {})}
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, unfinished=staged):
        save_file(
            dict(tensors), staged, metadata={**described, CHECKSUM: checksum(tensors, described)}
        )
        staged.replace(path)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata (but its own entry) and over names, types, shapes and values of the
    tensors.
    """
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {CHECKSUM}):
        digest.update(f"{key}={metadata[key]}\n".encode())
    _digest_tensors(digest, tensors)
    return digest.hexdigest()


def say_unchecked(path: Path, metadata: Mapping[str, str]) -> None:
    """One line for a safetensors file without a checksum, as others and older versions write them."""
    if CHECKSUM not in metadata:
        log.info("%s carries no checksum, so damage to it would not be noticed", path)


def read_state(path: Path) -> Mapping[str, Any]:
    """The state dict that a safetensors or a torch file is; one line says where nothing can tell its
    damage. Raises UserError for other contents.
    """
    if path.suffix != ".safetensors":
        content = read_pickle(path)
        if not isinstance(content, Mapping):
            raise UserError(
                f"{path} holds a {type(content).__name__}, not the weights of a network"
            )
        return content
    tensors, metadata = read_safetensors(path)
    say_unchecked(path, metadata)
    return tensors


def read_pickle(path: Path) -> Any:
    """Content of a torch file; raises UserError for a missing or damaged one, and for one that
    holds code.
    """
    checked = require_intact(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds code ({code[1]}), not only tensors, so it was not opened"
            ) from error
        raise UserError(f"{path} is truncated or not a torch file ({_one_line(error)})") from error
    except Exception as error:
        # Bytes that are no pickle make the unpickler fail in any way, IndexError included.
        raise UserError(f"{path} is truncated or not a torch file ({_one_line(error)})") from error
    if not checked:
        log.info("%s carries no checksums, so damage to it would not be noticed", path)
    _refuse_repeated(content, path)
    return content


def _refuse_repeated(content: Any, path: Path) -> None:
    """Raise UserError for a tensor whose shape repeats a few stored values billions of times, as
    strides of zero do: whoever copies it takes memory that the file never had.
    """
    pending = [content]
    seen: set[int] = set()  # a pickled list may hold itself
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, Tensor) and value.layout is torch.strided:
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored + REPEATED:
                raise UserError(
                    f"{path} holds a tensor of shape {tuple(value.shape)}, but only {stored} bytes of it"
                )


def require_intact(path: Path) -> bool:
    """Raise UserError for a torch file that is missing, or of which a part does not have its
    checksum.

    Returns whether it has checksums: files of old versions of torch have none.
    """
    require_file(path)
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return False
    if problem := _damage(path, *_identity(path)):
        raise UserError(f"{path} {problem}; copy or download it again")
    return True


def intact(path: Path) -> bool:
    """Whether a checkpoint is complete and every part of it has its checksum."""
    try:
        return not _damage(path, *_identity(path))
    except OSError:
        return False


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written anew."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=64)  # a resume asks twice: when the run starts, and when the strategy loads
def _damage(path: Path, *identity: int) -> str:
    """What is wrong with a zip archive, read once from beginning to end; empty for nothing."""
    with path.open("rb") as file:
        return archive_damage(file, path.stat().st_size)


def archive_damage(file: IO[bytes], size: int) -> str:
    """What is wrong with a zip archive of `size` bytes, all of which are read; empty for nothing."""
    try:
        with open_archive(file) as archive:
            if unfolded := _unfolded(archive, size):
                return f"would take {unfolded} bytes of memory, {UNFOLDED} times its size: torch packs nothing"
            part = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return f"is truncated or not a torch file ({_one_line(error)})"
    except (zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        return f"is damaged ({_one_line(error)})"
    return f"is damaged: its part {part} does not have its checksum" if part else ""


def open_archive(path: Path | IO[bytes]) -> zipfile.ZipFile:
    """A zip archive of torch or numpy; raises BadZipFile for one that neither of them packs so.

    Of bzip2 and LZMA, Python's reader unpacks whole blocks at once: kilobytes may be gigabytes.
    """
    archive = zipfile.ZipFile(path)
    for part in archive.infolist():
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archive.close()
            raise zipfile.BadZipFile(
                f"{part.filename} is packed by method {part.compress_type}, which is not read; "
                "those of torch and numpy are stored or deflated"
            )
    return archive


def _unfolded(archive: zipfile.ZipFile, size: int) -> int:
    """Bytes that the parts of an archive claim, where these are far more than its `size`; else 0.

    torch stores tensors as they are. Packed zeros would be unpacked as wholes, a thousand to one.
    """
    claimed = sum(part.file_size for part in archive.infolist())
    return claimed if claimed > UNFOLDED * size else 0


def require_file(path: Path) -> None:
    """Raise UserError unless `path` is a file."""
    if not path.is_file():
        raise UserError(
            f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist"
        )


def listing(what: str, names: Iterable[str], shown: int = SHOWN) -> str:
    """`3 missing: a, b, c`, sorted, at most `shown` names and the number of the rest; empty for no
    names.
    """
    names = sorted(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}: {', '.join(names[:shown])}{rest}" if names else ""


def _digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _one_line(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
