"""Checkpoints in several files, to which all processes write at once: a folder `last.ckpt/` by
torch.distributed.checkpoint, in place of one file that the first process has to gather.

    last.ckpt/.metadata          which part of which tensor lies where
    last.ckpt/metadata.sha256    its checksum
    last.ckpt/__<rank>_0.distcp  tensors, each a torch file, which has checksums of its own
    last.ckpt/rest.pt            all that is not a large tensor, with marks where those belong

It loads in any number of processes, and wherever a checkpoint of one file does. Like that it opens
without running code: its metadata are a pickle, of which only torch's own descriptions are read.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from tessellar.checkpoints.kinds import METADATA, REST, is_sharded
from tessellar.errors import UserError
from tessellar.tensor_files import archive_damage, intact, read_pickle

DIGEST = "metadata.sha256"
MARK = "tessellar.tensor"  # {MARK: key} stands for a tensor
LEAST = 1024  # values of a tensor that is written apart
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "pathlib": ("PosixPath", "Path"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


def write_sharded(
    content: Mapping[str, Any], folder: Path, together: bool, asynchronous: bool = False
) -> Future[Any] | None:
    """Write a checkpoint, by all processes `together` (each its own parts of sharded tensors) or by
    the one that calls.

    With `asynchronous` tensors are copied and this returns at once: the future is done when
    everything is written.
    """
    tensors: dict[str, Tensor] = {}
    rest = _take_apart(content, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if not together or dist.get_rank() == 0:
        torch.save(rest, folder / REST)
    writer = _Writer(folder, sync_files=True)
    if asynchronous:
        return async_save(tensors, storage_writer=writer, no_dist=not together)  # type: ignore[return-value]
    try:
        save(tensors, storage_writer=writer, no_dist=not together)
    except CheckpointException as error:  # of all processes, and no Exception
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
    return None


def read_sharded(folder: Path, like: Iterable[Tensor] = ()) -> dict[str, Any]:
    """The content of a checkpoint of several files.

    Tensors of the shape of a sharded one among `like` are sharded as it is, and all its processes
    read together; others are whole. Raises UserError for files that are damaged or missing.
    """
    if not is_intact(folder):
        raise UserError(f"{folder} is damaged or not complete; copy it again")
    models = {tuple(tensor.shape): tensor for tensor in like if isinstance(tensor, DTensor)}
    reader = _Reader(folder)
    tensors: dict[str, Tensor] = {}
    for key, facts in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(facts, TensorStorageMetadata):
            raise UserError(f"{folder}: {key} is not a tensor")
        model = models.get(tuple(facts.size))
        dtype = facts.properties.dtype
        if model is None:
            tensors[key] = torch.empty(facts.size, dtype=dtype)
        else:
            tensors[key] = torch.empty_like(model, dtype=dtype, requires_grad=False)
    try:
        load(tensors, storage_reader=reader, no_dist=not models)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} cannot be read ({reason})") from error
    content = _put_together(read_pickle(folder / REST), tensors, folder)
    if not isinstance(content, dict):
        raise UserError(f"{folder} holds a {type(content).__name__}, not a checkpoint")
    return content


def is_intact(path: Path) -> bool:
    """Whether a checkpoint of either kind is complete, as far as sizes and checksums say."""
    if not path.is_dir():
        return intact(path)
    if not is_sharded(path) or not intact(path / REST):
        return False
    try:
        if _digest(path) != (path / DIGEST).read_text(encoding="ascii"):
            return False
        for place in _Reader(path).read_metadata().storage_data.values():
            part = path / place.relative_path
            if part.parent != path or part.stat().st_size < place.offset + place.length:
                return False
            if not _is_sound(part, place.offset, place.length, part.stat().st_mtime_ns):
                return False
    except (OSError, UserError, AttributeError, ValueError):
        return False
    return True


@lru_cache(maxsize=4096)  # a resume asks twice: when the run starts, and when the strategy loads
def _is_sound(part: Path, offset: int, length: int, changed: int) -> bool:
    """Whether a tensor of a file that was `changed` then has its checksums."""
    with part.open("rb") as file:
        file.seek(offset)
        return not archive_damage(BytesIO(file.read(length)), length)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()


class _Writer(FileSystemWriter):
    """Keeps a checksum of the metadata too, which are written when everything else is."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        folder = Path(self.path)
        with (folder / DIGEST).open("w", encoding="ascii") as file:
            file.write(_digest(folder))
            file.flush()
            os.fsync(file.fileno())


class _Names(pickle.Unpickler):
    """Finds torch's descriptions of tensors, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in ALLOWED.get(module, ()) and not of_torch:
            raise UserError(f"the metadata of a checkpoint name {module}.{name}, which is code")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Names(file).load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # bytes that are no pickle fail in any way
            raise UserError(f"{path} is damaged ({type(error).__name__})") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} holds a {type(metadata).__name__}, not metadata")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with marks for its large and its sharded tensors, which go to `tensors`."""
    if isinstance(value, Tensor):
        if not isinstance(value, DTensor) and value.numel() < LEAST:
            return value.detach().clone()  # without the storage that it may be a part of
        tensors[path] = value.detach()
        return {MARK: path}
    if isinstance(value, Mapping):
        return {key: _take_apart(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [_take_apart(item, f"{path}/{key}", tensors) for key, item in enumerate(value)]
        return type(value)(items)
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor], where: Path) -> Any:
    if isinstance(value, dict) and value.keys() == {MARK}:
        if value[MARK] not in tensors:
            raise UserError(f"{where} lacks the tensor {value[MARK]!r:.80}")
        return tensors[value[MARK]]
    if isinstance(value, dict):
        return {key: _put_together(item, tensors, where) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_put_together(item, tensors, where) for item in value])
    return value
