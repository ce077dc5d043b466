"""metrics.csv: one row per logged step, one column per metric, complete again after a resume.

Lightning's CSV logger deletes the file when a run is resumed. This one drops only the rows that the resumed run makes
anew, and rewrites the header when a metric first appears.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Appends to `path`; columns `step`, then metrics in the order of their first appearance."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, str] = {}
        self._started = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of `step`; a row is written when the next one begins."""
        key = str(step or 0)
        if not self._started:
            self._start(int(key))
        if self._row and self._row["step"] != key:
            self.flush()
        self._row = {**self._row, "step": key, **{name: f"{value:.7g}" for name, value in metrics.items()}}

    def _start(self, step: int) -> None:
        """Keep an earlier part of this run, up to the step where it goes on."""
        self._started = True
        rows = []
        if self.path.exists():
            whole = self.path.read_text().rpartition("\n")[0]  # a kill may have left a part of the last line
            rows = [row for row in csv.DictReader(whole.splitlines()) if int(row["step"]) < step]
        self._columns = list(rows[0]) if rows else ["step"]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        staged = self.path.with_suffix(".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        staged.replace(self.path)

    @rank_zero_only
    def flush(self) -> None:
        """Write the row at hand; later metrics of its step begin another one."""
        if not self._row:
            return
        row, self._row = self._row, {}
        new = [name for name in row if name not in self._columns]
        if new:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()
