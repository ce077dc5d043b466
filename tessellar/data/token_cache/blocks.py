"""A cache under way: a folder `.NAME.unfinished` beside its place, in blocks of images.

Rows of tokens lie where they belong in one file; what else a block brings (labels, checksums,
captions) is one small file, whose presence says that the block is done. So an interruption loses the
blocks under way alone, the same command goes on behind the others, and several processes write at
once, each its own blocks. What comes out does not depend on any of that.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tessellar import distributed
from tessellar.errors import UserError, writing
from tessellar.npz import read_arrays

log = logging.getLogger(__name__)
PLAN = "plan.json"
LOCK = "lock"
SIZE = 4096
"""Images of a block, about: a multiple of those that are encoded at once."""


ARRAYS = ("labels", "sums", "captions", "ends", "corrupt")  # of a block's file


@dataclass(frozen=True)
class Block:
    """What the images of a block bring besides their tokens; `ends` are places in `captions`."""

    labels: np.ndarray
    sums: np.ndarray
    captions: bytes
    ends: np.ndarray
    corrupt: int


class Blocks:
    """The folder of an unfinished cache of `count` images in blocks of `size`."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder = folder
        self.count = count
        self.size = size

    @property
    def number(self) -> int:
        return -(-self.count // self.size)

    def images(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.count))

    def path(self, block: int) -> Path:
        return self.folder / f"block_{block:06d}.npz"

    def done(self) -> list[int]:
        return [block for block in range(self.number) if self.path(block).is_file()]

    def write(self, block: int, content: Block) -> None:
        """Say that a block is done, once its tokens are on the disk."""
        staged = self.path(block).with_suffix(".part")
        with open(staged, "wb") as file:
            np.savez(
                file,
                labels=content.labels,
                sums=content.sums,
                captions=np.frombuffer(content.captions, dtype=np.uint8),
                ends=content.ends,
                corrupt=np.int64(content.corrupt),
            )
            file.flush()
            os.fsync(file.fileno())
        staged.replace(self.path(block))

    def read(self, block: int) -> Block:
        """A block that is done; raises UserError for a damaged one."""
        path = self.path(block)
        try:
            content = read_arrays(path, {name: (name,) for name in ARRAYS})
            return Block(
                labels=content["labels"],
                sums=content["sums"],
                captions=content["captions"].tobytes(),
                ends=content["ends"],
                corrupt=int(content["corrupt"]),
            )
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{path} ")
            raise UserError(
                f"{path} is damaged ({reason}): remove it and give the command again"
            ) from error

    def clear(self) -> None:
        """Remove what a finished cache does not need."""
        for name in (*(self.path(block).name for block in range(self.number)), PLAN, LOCK):
            (self.folder / name).unlink(missing_ok=True)


@contextmanager
def unfinished(target: Path, plan: Mapping[str, Any], count: int, size: int) -> Iterator[Blocks]:
    """The folder of a cache under way, for all processes; it stays where the block raises.

    One of another plan (data, tokenizer, settings) is removed. Raises UserError where another
    command writes there.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    blocks = Blocks(folder, count, size)
    lock: IO[str] | None = None
    if distributed.rank() == 0:
        with writing(target):
            lock = _prepare(folder, json.loads(json.dumps(plan)))
    distributed.barrier()
    try:
        with writing(target):
            yield blocks
    except BaseException:
        kept = len(blocks.done())
        if distributed.rank() == 0 and not kept:
            shutil.rmtree(folder, ignore_errors=True)
        elif distributed.rank() == 0:
            log.warning(
                "%d of %d blocks are encoded and stay in %s: the same command goes on",
                kept,
                blocks.number,
                folder,
            )
        raise
    finally:
        if lock is not None:
            lock.close()


def _prepare(folder: Path, plan: Any) -> IO[str]:
    """Make the folder, or check that it is of the same plan; returns the lock that is held."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another process writes {folder}; wait for it, or use another --out"
        ) from error
    with suppress(OSError, ValueError):  # there is none, or one that cannot be read
        if json.loads((folder / PLAN).read_text(encoding="utf-8")) == plan:
            return lock
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    staged = folder / f"{PLAN}.part"
    with writing(folder / PLAN, unfinished=folder):  # nothing is lost: no block is done
        staged.write_text(json.dumps(plan), encoding="utf-8")
        staged.replace(folder / PLAN)
    return lock
