"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save a resumable state after the update under way, then end
the run.

Clusters send one of them some time before they kill a job, a terminal that is closed sends SIGHUP.
Lightning only sets a flag for SIGTERM, which it looks at after an epoch, takes SIGUSR1 for a
request to SLURM, and leaves at once at Ctrl-C without a word. A validation under way is finished
first. Data workers ignore these signals.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from tessellar import distributed
from tessellar.callbacks.checkpoints import Checkpoints, validates_now
from tessellar.callbacks.companions import end, processes_beside
from tessellar.data.workers import INTERRUPTING


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; `number` is the signal's."""

    def __init__(self, number: int, update: int) -> None:
        super().__init__(line_of(number, update))
        self.number = number


def line_of(number: int, update: int) -> str:
    """What is said of a run that a signal ended."""
    name = signal.Signals(number).name
    return f"{name}: saved and stopped after update {update}; continue with --resume auto"


class Interruption(L.Callback):
    """Listens from the first validation or training batch on; whoever receives the signal, all
    processes save and stop together.

    Raises Interrupted at the first hook behind the batch that was saved, so that the batch's
    metrics are written too. A second Ctrl-C leaves at once. Where torchrun has gone (it does not
    forward every signal), its processes save and stop as well, as after SIGHUP. `mark` is called
    with the run's last line, by the first process, as soon as the state is saved.
    """

    def __init__(self, mark: Callable[[str], None] | None = None) -> None:
        self.received = 0  # by this process, at any moment
        self._agreed = 0  # what all processes know of, after the update under way
        self._mark = mark
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._trainer: L.Trainer | None = None
        self._saved = False
        self._update = -1  # the one that was saved

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._listen(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            # Lightning restores the earlier handlers when the run ends.
            for number in INTERRUPTING:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if number == self.received == signal.SIGINT:
            os.write(2, b"SIGINT: left without saving\n")
            if self._trainer is not None:
                end(processes_beside(self._trainer))
            os._exit(128 + number)  # whatever the process is waiting for
        self.received = number
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, b"\nsaving after this update; Ctrl-C once more leaves at once\n")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches % pl_module.accumulate:
            return
        self._agreed = self._of_all(trainer)
        if not self._agreed:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.save_at_once(trainer, pl_module)
        self._update = pl_module.updates
        if self._mark is not None and trainer.is_global_zero:
            self._mark(line_of(self._agreed, self._update))
        # A validation that belongs to the update is made first.
        self._saved = not validates_now(trainer)

    def _of_all(self, trainer: L.Trainer) -> int:
        """The signal that any process received, 0 for none."""
        # Lightning noted one that came before training began.
        if self.received == 0 and trainer.received_sigterm:
            self.received = int(signal.SIGTERM)
        if self.received == 0 and self._launcher not in (None, os.getppid()):
            self.received = int(signal.SIGHUP)
        if not distributed.is_distributed():
            return self.received
        return max(distributed.gather_rows(torch.tensor([self.received])).tolist())

    def _leave(self, pl_module: Any) -> None:
        if self._saved:
            raise Interrupted(self._agreed, pl_module.updates)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._leave(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._leave(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved = self._agreed != 0 and pl_module.updates == self._update
