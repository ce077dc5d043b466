"""The one exception that stands for a user's mistake: the command line prints it as one line,
without a traceback.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def in_one_line(text: str) -> str:
    """`text` with whatever is no printable character escaped: names and texts from files may hold
    line breaks.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """What is wrong, where (key, file, line), and what would be right, in one short message."""


@contextmanager
def writing(path: str | Path, unfinished: str | Path | None = None) -> Iterator[None]:
    """Raise UserError, in one line that names `path`, where what is done inside cannot be written.

    A full or read-only disk is a user's matter, and the errors of a failing write name no file.
    `unfinished`, the file or folder that is written beside `path`, is removed then.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_a_write(error):
            raise
        if unfinished is not None:
            remove(Path(unfinished))
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else " ".join(str(error).split())
        )
        raise UserError(f"{path} could not be written: {reason}") from error


def is_of_a_write(error: Exception) -> bool:
    """Whether an error is that of a failing write: those of Pillow, torch.save and safetensors have
    no type of it.

    An error that names its file is left as it is, and so is one of reading.
    """
    if isinstance(error, OSError):
        return error.filename is None and error.errno is not None
    text = str(error)
    return (
        "PytorchStreamWriter" in text
        or "unexpected pos" in text
        or "I/O error" in text
        or "os error" in text.lower()
    )


def remove(path: Path) -> None:
    """Give the space of something unfinished, a file or a folder, back."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
