"""Signals, full disks and kills during a write: a resumable state is always left behind."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.callbacks.interruption import Interrupted, Interruption
from tessellar.errors import UserError
from tessellar.training.runs import Run


class SignalDuring(L.Callback):
    """This process gets a signal while the batch of a number is trained on."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches + 1 == self.batch:
            os.kill(os.getpid(), self.number)


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "a" / "checkpoints", 1000, "val/loss", "min")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("batch", [3, 8])  # inside an update of two batches, at the end of an epoch
def test_a_signal_saves_a_resumable_state(
    fit, make, tmp_path: Path, number: signal.Signals, batch: int
) -> None:
    handler = signal.getsignal(number)
    whole = make.generator_module(accumulate=2)
    _, losses = fit(whole, 6)

    module = make.generator_module(accumulate=2)
    update = (batch + 1) // 2
    with pytest.raises(
        Interrupted,
        match=f"{number.name}: saved and stopped after update {update}; .*--resume auto",
    ):
        fit(
            module,
            6,
            [SignalDuring(batch, number), Interruption(), checkpoints(tmp_path)],
            enable_checkpointing=True,
        )
    assert module.updates == update and signal.getsignal(number) == handler

    found = Run("a", tmp_path, resume="auto").checkpoint
    resumed = make.generator_module(accumulate=2)
    _, rest = fit(resumed, 6, ckpt_path=found)
    assert rest == losses[2 * update :]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_a_signal_during_the_last_update_lets_the_run_finish(fit, make, tmp_path: Path) -> None:
    trainer, _ = fit(make.generator_module(), 2, [SignalDuring(2, signal.SIGTERM), Interruption()])
    assert trainer.global_step == 2 and trainer.state.finished


class Killed(BaseException):
    """Ends the write where it stands, as a kill does: nothing that handles errors may see it."""


class Faulty:
    """A file system whose n-th operation (write, flush, move) fails; counts operations."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fault: BaseException | None = None, at: int = 0
    ) -> None:
        self.fault, self.at, self.operations, self.written = fault, at, 0, 0
        replace, fsync = Path.replace, os.fsync
        monkeypatch.setattr(Path, "replace", lambda *given: (self.count(), replace(*given))[1])
        monkeypatch.setattr(os, "fsync", lambda *given: (self.count(), fsync(*given))[1])

    def count(self) -> None:
        self.operations += 1
        if self.operations == self.at and self.fault is not None:
            raise self.fault

    def save_checkpoint(self, path: Path) -> None:
        """What Lightning does, at half of it an operation of its own."""
        self.written += 1
        torch.save({"update": self.written, "weight": torch.zeros(5000)}, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        self.count()
        path.write_bytes(content)


def save_thrice(folder: Path, disk: Faulty) -> None:
    callback, module = checkpoints(folder), SimpleNamespace(updates=0)
    callback.folder.mkdir(parents=True)
    trainer: Any = SimpleNamespace(
        save_checkpoint=disk.save_checkpoint,
        is_global_zero=True,
        lightning_module=torch.nn.Linear(1, 1),
    )
    for _ in range(3):
        module.updates += 1
        callback.save(trainer, module)


def operations_of_three(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Faulty(monkeypatch)
        save_thrice(folder, disk)
    return disk.operations


def test_whatever_operation_fails_a_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """A kill and a full disk at every write, flush and move of three saves."""
    total = operations_of_three(tmp_path / "count")
    assert total == 4 + 5 + 5  # half of a write, its flush, one or two moves, the folder's flush
    for fault in (
        Killed(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write failed"),
    ):
        for at in range(1, total + 1):
            folder = tmp_path / f"{type(fault).__name__}-{at}"
            with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises((Killed, UserError)):
                save_thrice(folder, disk := Faulty(monkeypatch, fault, at))
            found = Run("a", folder, resume="auto").checkpoint
            finished = disk.written - 1  # at least what was saved before the write that failed
            update = 0 if found is None else torch.load(found, weights_only=True)["update"]
            assert update >= finished, f"{fault!r} at operation {at}"


@given(st.data())
def test_a_checkpoint_cut_or_changed_anywhere_is_left_aside(
    tmp_path_factory: pytest.TempPathFactory, data
) -> None:
    root = tmp_path_factory.mktemp("runs")
    folder = root / "a" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("last.ckpt", "previous.ckpt"):
        torch.save({"weight": torch.arange(50)}, folder / name)
    content = bytearray((folder / "last.ckpt").read_bytes())
    (folder / "last.ckpt").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert Run("a", root, resume="auto").checkpoint == folder / "previous.ckpt"


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_thrice(tmp_path, Faulty(monkeypatch))
    folder = tmp_path / "a" / "checkpoints"
    (folder / "last.ckpt").write_bytes(b"")
    run = Run("a", tmp_path, resume="auto")
    run.create()
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        "previous.ckpt",
    ]  # may yet be refused
    run.begin("", {"command": "", "commit": ""})
    assert sorted(path.name for path in folder.iterdir()) == ["last.damaged", "previous.ckpt"]
    (folder / "previous.ckpt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"previous.ckpt cannot be read: remove them .* or use --name"
    ):
        Run("a", tmp_path, resume="auto")


def test_two_processes_never_write_into_one_run(tmp_path: Path) -> None:
    first = Run("a", tmp_path)
    first.create()
    child = os.fork()  # locks belong to a process
    if child == 0:
        try:
            Run("a", tmp_path, resume="auto").create()
        except UserError as error:
            os._exit(7 if "another process is training" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
