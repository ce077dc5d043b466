"""The one exception that stands for a user's mistake: the command line prints it as one line,
without a traceback.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def in_one_line(text: str) -> str:
    """`text` with whatever is no printable character escaped: names and texts from files may hold
    line breaks.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(ValueError):
    """What is wrong, where (key, file, line), and what would be right, in one short message.

    A ValueError, as Python users expect of an argument that does not fit.
    """


def check_is_file(path: str | Path) -> None:
    """Raise UserError where `path` is a pipe, a socket or a device: reading one may never end.

    What does not exist, or cannot be looked at, is left to whoever opens it.
    """
    path = Path(path)
    try:
        is_other = path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return
    if is_other:
        raise UserError(f"{path} is a pipe or a device, not a file")


@contextmanager
def writing(path: str | Path, unfinished: str | Path | None = None) -> Iterator[None]:
    """Raise UserError, in one line that names `path`, where what is done inside cannot be written.

    A full or read-only disk is a user's matter, and the errors of a failing write name no file.
    `unfinished`, the file or folder that is written beside `path`, is removed whatever ends the
    write. A pipe or a device is refused: what is moved into its place would be the end of it.
    """
    check_is_file(path)
    try:
        yield
    except BaseException as error:
        if unfinished is not None:
            remove(Path(unfinished))
        if not is_of_a_write(error, Path(path), unfinished):
            raise
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else " ".join(str(error).split())
        )
        raise UserError(f"{path} could not be written: {reason}") from error


def is_of_a_write(error: BaseException, path: Path, unfinished: str | Path | None) -> bool:
    """Whether an error is that of a failing write: those of Pillow, torch.save and safetensors have
    no type of it.

    An error that names another file is left as it is, and so is one of reading.
    """
    if isinstance(error, OSError):
        return error.errno is not None and _names(error.filename, path, unfinished)
    if not isinstance(error, (RuntimeError, SafetensorError)):
        return False
    text = str(error)
    return (
        "PytorchStreamWriter" in text
        or "unexpected pos" in text
        or "I/O error" in text
        or "os error" in text.lower()
    )


def _names(filename: Any, path: Path, unfinished: str | Path | None) -> bool:
    """Whether an error names no file, the one that is written, a folder it lies in, or what is
    written in its place.
    """
    if not isinstance(filename, (str, Path)):
        return True
    named = Path(filename)
    staged = path if unfinished is None else Path(unfinished)
    return named in (path, staged, *path.parents) or staged in named.parents


def remove(path: Path) -> None:
    """Give the space of something unfinished, a file or a folder, back."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
