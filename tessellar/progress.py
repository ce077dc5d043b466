"""How far a long command is: one bar on a terminal, elsewhere a line every so often with the same.

Lines come more rarely the longer a command runs: after ten seconds, then after a tenth of the time
so far, at least every five minutes. So a job of hours says where it is, and its log stays short.
"""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)
FIRST = 10.0  # seconds until the first line
RAREST = 300.0  # seconds between two lines at most
REFRESH = 0.2  # seconds between two drawings of a bar
_shown: list[Any] = []  # the bar on the terminal, which other lines must not cut


def on_terminal() -> bool:
    """Whether somebody watches stderr."""
    return sys.stderr.isatty()


class Pace:
    """When the next line is due."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def due(self) -> bool:
        """Whether a line is due now; then the next one is due later."""
        now = time.monotonic()
        interval = min(max((now - self._start) / 10, FIRST), RAREST)
        if now - self._last < interval:
            return False
        self._last = now
        return True


class Progress:
    """`with Progress("encoding", total, "images") as bar: bar.update(32)`.

    `total` may be None where nobody knows it. `quiet` says nothing at all: on all processes but the
    first.
    """

    def __init__(self, what: str, total: int | None, unit: str, quiet: bool = False) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.quiet = quiet
        self.done = 0
        self._first = 0  # what was done before this process began
        self._start = time.monotonic()
        self._drawn = 0.0
        self._pace = Pace()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if on_terminal() and not self.quiet:
            from tqdm.auto import tqdm  # an import of tenths of a second, for terminals alone

            self._bar = tqdm(
                total=self.total,
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} |{bar}|" if self.total else "{desc}",
            )
            _shown.append(self._bar)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            _shown.remove(self._bar)
            self._bar.close()
            self._bar = None

    def start_at(self, done: int) -> None:
        """Begin after `done` of the total, which an earlier process did."""
        self.done = done
        self._first = done
        self._start = time.monotonic()

    @property
    def is_drawn(self) -> bool:
        """Whether a bar is on the terminal."""
        return self._bar is not None

    @property
    def wants_facts(self) -> bool:
        """Whether what is given to `update` now would be drawn: reading a GPU for it takes time."""
        return time.monotonic() - self._drawn >= REFRESH

    def update(self, count: int = 1, facts: Mapping[str, str] | None = None) -> None:
        """`count` more are done; `facts` are said beside."""
        self.done += count
        if self.quiet:
            return
        if self._bar is not None:
            self._draw(facts or {})
        elif self._pace.due() and self.done != self.total:
            log.info("%s", self.line(facts or {}))

    def _draw(self, facts: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self._drawn < REFRESH and self.done != self.total:
            return
        self._drawn = now
        self._bar.n = self.done
        self._bar.set_description_str(self.line(facts), refresh=False)
        self._bar.refresh()

    def line(self, facts: Mapping[str, str]) -> str:
        """`encoding: 1,280 of 50,000 images, 312 images/s, eta 3:12`, with `facts` before the eta."""
        of = f" of {self.total:,}" if self.total else ""
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        parts = [f"{self.done:,}{of} {self.unit}", f"{rate} {self.unit}/s"]
        parts += [f"{name} {value}" for name, value in facts.items()]
        if self.eta is not None:
            parts.append(f"eta {duration(self.eta)}")
        return f"{self.what}: {', '.join(parts)}"

    @property
    def rate(self) -> float:
        """How much a second was done by this process."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds until the total is reached; None where that cannot be told."""
        if self.total is None or self.rate <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate


def count_of(number: int, one: str, several: str) -> str:
    """`1 class`, `8 classes`."""
    return f"{number:,} {one if number == 1 else several}"


def duration(seconds: float) -> str:
    """`3:12`, `1:02:03` or `2 d 3:00:00`."""
    whole = int(seconds + 0.5)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days} d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class BesideBar(logging.StreamHandler):
    """Writes records to stderr; a bar that is shown there is taken away and drawn anew below."""

    def emit(self, record: logging.LogRecord) -> None:
        for bar in _shown:
            bar.clear()
        super().emit(record)
        for bar in _shown:
            bar.refresh()
