"""metrics.csv: one row per logged step, one column per metric, complete again after any kill and
any resume.

Every metric is on the disk as soon as it is logged: the last row is written anew until the next one
begins. So a checkpoint never knows of more than the file does. A resumed run cuts the file to the
checkpoint's update and fills the row of that update further, as the uninterrupted run does (batches
that are accumulated share it). Lightning's CSV logger deletes the file when a run is resumed.

A file that somebody changed since, so that rows of it cannot be read, is kept beside the new one.
"""

import csv
import io
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from tessellar.errors import writing

log = logging.getLogger(__name__)
DIGITS = 18  # of the number of an update


class Rows(NamedTuple):
    """Rows of a file in its order, and how many of its lines are no rows of a run."""

    rows: list[dict[str, str]]
    unread: int


class MetricsFile(Logger):
    """Appends to `path`; columns `step`, then metrics in the order of their first appearance."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, str] = {}
        self._place = 0  # of the last row in the file, in bytes
        self._started = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Keep the rows of an earlier part of this run up to `step`, where it goes on; none of a
        run that starts.

        A file with lines that cannot be read is kept under another name, which one line says.
        """
        self._started = True
        rows: list[dict[str, str]] = []
        if step > 0:
            found = self._read()
            rows = [row for row in found.rows if int(row["step"]) <= step]
            if found.unread:
                self._set_aside(found.unread)
        self._columns = list(rows[0]) if rows else ["step"]
        self._row = rows.pop() if rows else {}
        if self.path.exists() or rows:
            self._rewrite(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of `step`, the last one, or begin it."""
        key = str(step or 0)
        if not self._started:
            self.begin(int(key) - 1)
        values = {name: f"{value:.7g}" for name, value in metrics.items()}
        new = [name for name in values if name not in self._columns]
        if self._row.get("step") != key:
            self._row = {"step": key}
            self._place = self.path.stat().st_size if self.path.exists() else 0
        self._row |= values
        self._columns += new
        if new or self._place == 0:
            self._rewrite(self._read(self._place).rows)
            return
        # By one write: a kill leaves the older row or the newer one, a full disk the older one.
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            file.seek(self._place)
            before = file.read()
            try:
                _put(file, self._place, _lines(self._columns, [self._row]))
            except OSError:
                _put(file, self._place, before)
                raise

    def _read(self, end: int | None = None) -> Rows:
        """The whole rows of the file, of its first `end` bytes; a kill may have left a part of one
        at its end, which counts neither way.
        """
        if not self.path.exists():
            return Rows([], 0)
        # A mark at the beginning, as spreadsheets write one, is no part of the first name.
        text = self.path.read_bytes()[:end].decode("utf-8-sig", errors="replace")
        lines = text.rpartition("\n")[0].splitlines()
        if not lines:
            return Rows([], 0)
        try:
            table = list(csv.reader(lines))
        except csv.Error:  # a field without end
            return Rows([], len(lines))
        columns = table[0]
        if columns.count("step") != 1 or len(set(columns)) < len(columns):
            return Rows([], len(lines))
        whole = [row for row in table[1:] if is_whole(row, columns)]
        rows = [dict(zip(columns, row, strict=True)) for row in whole]
        return Rows(rows, len(table) - 1 - len(whole))

    def _set_aside(self, unread: int) -> None:
        """Keep a copy of a file with lines that are no rows, and say so."""
        number = 0
        while (kept := self.path.with_name(f"{self.path.stem}.{number}.csv")).exists():
            number += 1
        with writing(kept, unfinished=kept):
            kept.write_bytes(self.path.read_bytes())
        log.warning(
            "%s has %d lines that are no rows of a run; as it was it is kept as %s",
            self.path,
            unread,
            kept.name,
        )

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Put the header, `rows` and the last row in place of the file."""
        staged = self.path.with_suffix(".part")
        before = _lines(
            self._columns, [dict(zip(self._columns, self._columns, strict=True)), *rows]
        )
        last = _lines(self._columns, [self._row] if self._row else [])
        with writing(self.path, unfinished=staged):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(before + last)
            staged.replace(self.path)
        self._place = len(before)


def _put(file: BinaryIO, place: int, content: bytes) -> None:
    """Have an unbuffered file end with `content` from `place` on."""
    file.seek(place)
    left = memoryview(content)
    while left:  # the last write before a disk is full takes a part of it
        left = left[file.write(left) :]
    file.truncate()


def _lines(columns: list[str], rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def is_whole(row: list[str], columns: list[str]) -> bool:
    if len(row) != len(columns):
        return False
    step = row[columns.index("step")]
    return step.isdecimal() and len(step) <= DIGITS
