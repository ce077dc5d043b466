"""log.txt of a run: every line that our modules log, with its time; what was said before the run
began comes first, and the error that ended it last.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tessellar.errors import UserError, in_one_line, writing

LOG = "log.txt"
OURS = "tessellar"


class RunLog(logging.Handler):
    """Holds lines until `open` says that the run has begun: a refused run leaves no file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.INFO)
        self.path = folder / LOG
        self._held: list[str] = []
        self._file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage(), record.levelname)

    def say(self, text: str, level: str = "INFO") -> None:
        """Write a line now, or once the run has begun."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{stamp} {level:<7} {in_one_line(text)}\n"
        if self._file is None:
            self._held.append(line)
        else:
            with writing(self.path):
                self._file.write(line)
                self._file.flush()

    def open(self) -> None:
        """Append to the run's file from now on."""
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
            self._file.writelines(self._held)
            self._file.flush()
        self._held.clear()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take
                self._file.close()
            self._file = None
        super().close()


@contextmanager
def logging_into(log: RunLog) -> Iterator[None]:
    """Let everything that our modules log from INFO up come to `log` too, and what ends the block."""
    ours = logging.getLogger(OURS)
    level = ours.level
    if ours.getEffectiveLevel() > logging.INFO:
        ours.setLevel(logging.INFO)
    ours.addHandler(log)
    try:
        yield
    except BaseException as error:
        with suppress(UserError):  # the disk is full: the first error is the one to tell
            log.say(str(error) or type(error).__name__, "ERROR")
        raise
    finally:
        ours.removeHandler(log)
        ours.setLevel(level)
        log.close()
