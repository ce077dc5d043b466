"""How every command ends: a user's mistake is one line on stderr and exit code 2, never a
traceback.

What nobody foresaw is one line as well, exit code 1, and its traceback goes to a file: of the run
where there is one.
"""

import os
import stat
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from tessellar.errors import UserError, in_one_line, writing

TRACEBACK = "traceback.txt"

_folder: Path | None = None  # where this process puts tracebacks


def put_tracebacks_into(folder: Path) -> None:
    """From now on a traceback goes to `folder`, which need not exist yet."""
    global _folder
    _folder = folder


def run(command: Callable[[], int | None]) -> int:
    """Call `command` and return the process's exit code."""
    before = threading.excepthook
    threading.excepthook = _of_a_thread
    try:
        return _run(command)
    except KeyboardInterrupt:  # while a mistake was told
        return 130
    finally:
        threading.excepthook = before


def _of_a_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that could not write (TensorBoard's) has said so to the one that asked it."""
    error = failed.exc_value
    if isinstance(error, Exception) and not isinstance(error, OSError):
        _say(f"error: {in_short(error)} ({_kept(error)})")


def _run(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 141  # whoever read our output has gone
    except Exception as error:
        named = (
            isinstance(error, OSError) and error.filename is not None and error.strerror is not None
        )
        if named:
            _say(f"error: {error.filename}: {error.strerror}")  # type: ignore[attr-defined]
            return 2
        _say(f"error: {in_short(error)} ({_kept(error)})")
        return 1


def _say(line: str) -> None:
    """Print one line: file names and texts from files may hold anything."""
    print(in_one_line(line), file=sys.stderr)


def in_short(error: Exception) -> str:
    """The kind of an error and the first 200 characters of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _kept(error: Exception) -> str:
    """Where the traceback of an error was written to, as words."""
    content = "".join(traceback.format_exception(error))
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    name = TRACEBACK if rank == 0 else f"traceback-{rank}.txt"
    for place in (_of_the_run, _of_the_user):
        try:
            folder = place()
            if folder is not None:
                folder.mkdir(exist_ok=True)
                with writing(folder / name, unfinished=folder / f".{name}.part"):
                    (folder / f".{name}.part").write_text(content, errors="backslashreplace")
                    (folder / f".{name}.part").replace(folder / name)
                return f"traceback: {folder / name}"
        except (OSError, UserError):
            continue
    return "the traceback could not be written anywhere"


def _of_the_run() -> Path | None:
    return _folder


def _of_the_user() -> Path:
    """A folder among the system's temporary ones that nobody else writes into.

    Its name can be known: in one that is another's, a link could lead to a file of this user.
    """
    folder = Path(tempfile.gettempdir()) / f"tessellar-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    is_ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    if not is_ours or facts.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="tessellar-"))
    return folder
