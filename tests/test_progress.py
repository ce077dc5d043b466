"""How far a command is: lines off a terminal, one bar on it, and a whole run's in the same words."""

import io
import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessellar import progress
from tessellar.callbacks.run_progress import RunProgress, missed
from tessellar.progress import BesideBar, Progress, duration


class Clock:
    """Seconds under the test's control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(
            "tessellar.callbacks.run_progress.time", SimpleNamespace(monotonic=lambda: self.now)
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that keeps what is written to it."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (59.6, "1:00"), (192, "3:12"), (3723, "1:02:03"), (2 * 86400 + 3 * 3600, "2 d 3:00:00")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_lines_come_more_rarely_with_time(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Progress("encoding", 36_000, "images") as bar:
        for _ in range(3600):
            clock.now += 1
            bar.update(10)
    assert caplog.messages[0] == "encoding: 100 of 36,000 images, 10 images/s, eta 59:50"
    assert 15 < len(caplog.messages) < 60


def test_short_commands_say_nothing_and_other_processes_never(clock, caplog) -> None:
    with caplog.at_level("INFO"), Progress("encoding", 10, "images") as bar:
        clock.now += 9
        bar.update(10)
    with caplog.at_level("INFO"), Progress("encoding", 10, "images", quiet=True) as bar:
        clock.now += 1000
        bar.update(5)
    assert not caplog.messages


def test_a_terminal_shows_a_bar_and_lines_go_beside_it(clock, terminal, caplog) -> None:
    with Progress("encoding", 100, "images") as bar:
        clock.now += 5
        bar.update(50)
        record = logging.LogRecord("x", logging.INFO, "", 0, "a line", None, None)
        BesideBar(terminal).emit(record)
        clock.now += 5
        bar.update(50)
    shown = terminal.getvalue()
    assert "encoding: 50 of 100 images, 10 images/s, eta 0:05" in shown and "a line\n" in shown
    assert not caplog.messages


def trainer_of(**facts: Any) -> SimpleNamespace:
    common = {
        "is_global_zero": True,
        "world_size": 2,
        "callback_metrics": {},
        "enable_validation": True,
        "check_val_every_n_epoch": None,
        "num_training_batches": 100,
    }
    return SimpleNamespace(**common, **facts)


def train(updates: int, total: int, clock: Clock, seconds: float, accumulate: int = 1) -> None:
    """Updates of 8 images on each of 2 processes, as Lightning calls a callback."""
    module = SimpleNamespace(
        updates=0,
        total_updates=total,
        best_by=("val/psnr", "max"),
        device=torch.device("cpu"),
        accumulate=accumulate,
    )
    trainer = trainer_of(val_check_batch=10, log_every_n_steps=10)
    callback = RunProgress()
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    outputs = {"tokens": torch.zeros(8, 4), "loss": torch.tensor(0.12345)}
    for batch in range(updates * accumulate):
        clock.now += seconds
        module.updates = (batch + 1) // accumulate
        if module.updates >= 50:
            trainer.callback_metrics["val/psnr"] = torch.tensor(21.5)
        callback.on_train_batch_end(trainer, module, outputs, None, batch)  # type: ignore[arg-type]
    callback.on_train_end(trainer, module)  # type: ignore[arg-type]


def test_a_run_says_where_it_is(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(100, 100, clock, seconds=2)
    said = caplog.messages
    assert said[0] == "update 5 of 100: loss 0.1235, 8 images/s, eta 3:10"
    assert said[-1] == "update 100 of 100: loss 0.1235, val/psnr 21.5, 8 images/s, eta 0:00"
    assert 20 <= len(said) <= 30


def test_a_run_without_an_end_and_one_that_accumulates(clock: Clock, caplog) -> None:
    with caplog.at_level("INFO"):
        train(30, sys.maxsize, clock, seconds=1)
    assert caplog.messages[0] == "update 10: loss 0.1235, 16 images/s"
    caplog.clear()
    with caplog.at_level("INFO"):
        train(20, 20, clock, seconds=1, accumulate=4)
    assert caplog.messages[0] == "update 1 of 20: loss 0.1235, 16 images/s, eta 1:16"


def test_a_run_on_a_terminal_is_one_bar(clock, terminal, caplog) -> None:
    with caplog.at_level("INFO"):
        train(100, 100, clock, seconds=2)
    shown = re.findall(r"update \d+ of 100: [^|\r]*", terminal.getvalue())
    assert len(shown) >= 100 and "val/psnr 21.5" in shown[-1] and "eta" in shown[-1]
    assert not caplog.messages


def test_a_run_that_ends_before_its_first_validation_is_told_so() -> None:
    module = SimpleNamespace(accumulate=2)
    assert missed(trainer_of(val_check_batch=20, log_every_n_steps=10), module, 10) == []  # type: ignore[arg-type]
    short = missed(trainer_of(val_check_batch=21, log_every_n_steps=50), module, 10)  # type: ignore[arg-type]
    assert ["no best.ckpt" in short[0], "no losses in metrics.csv" in short[1]] == [True, True]
    off = trainer_of(val_check_batch=float("inf"), log_every_n_steps=1)
    off.enable_validation = False
    assert missed(off, module, 10) == []  # type: ignore[arg-type]
