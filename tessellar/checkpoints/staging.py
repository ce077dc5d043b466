"""Folders that appear complete or not at all: written beside their place, then moved there.

A folder that exists is replaced only where the user allows it and only if it is one of ours (it
holds the marker file).
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessellar.errors import UserError, writing


def check_target(target: Path, marker: str, overwrite: bool) -> None:
    """Raise UserError unless `target` may be written: absent, empty, or a folder of ours with
    `overwrite`.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} exists and is not a folder; choose another --out")
    if not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise UserError(
            f"{target} is not empty and holds no {marker}, so it is never replaced; choose another --out"
        )
    if not overwrite:
        raise UserError(f"{target} exists; choose another --out, or give --overwrite to replace it")


@contextmanager
def staged_folder(target: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into; when the block ends it becomes `target`, when the block raises it
    is removed.
    """
    target = Path(os.path.abspath(target))
    check_target(target, marker, overwrite)
    stage = beside(target, "partial")
    missing = [folder for folder in target.parents if not folder.exists()]
    with writing(target):
        stage.mkdir(parents=True)
    try:
        with writing(target, unfinished=stage):
            yield stage
            put_in_place(stage, target, marker, overwrite)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in missing:  # those that nothing was moved into are empty
            with suppress(OSError):
                folder.rmdir()


def finish(stage: Path, target: Path, marker: str, overwrite: bool = False) -> None:
    """Put a folder that was written beside `target`, over several commands maybe, in its place."""
    check_target(target, marker, overwrite)
    put_in_place(stage, target, marker, overwrite)


def beside(target: Path, what: str) -> Path:
    """A fresh hidden name in the folder of `target`."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{what}")


def put_in_place(stage: Path, target: Path, marker: str, overwrite: bool) -> None:
    """Put the folder in its place, as a whole, even where another command writes to the same place
    at once.

    A folder moves to a free or an empty place only, which the system decides; of two commands one
    is the first.
    """
    try:
        stage.rename(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    # Refuses where another command was the first.
    check_target(target, marker, overwrite)
    old = beside(target, "old")
    target.rename(old)
    stage.rename(target)
    shutil.rmtree(old)
