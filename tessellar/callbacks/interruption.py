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
from typing import Any

import lightning as L
import torch

from tessellar import distributed
from tessellar.callbacks.checkpoints import Checkpoints, validates_now
from tessellar.data.workers import INTERRUPTING


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; `number` is the signal's."""

    def __init__(self, number: int, update: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name}: saved and stopped after update {update}; continue with --resume auto"
        )
        self.number = number


class Interruption(L.Callback):
    """Listens from the start of training on; whoever receives the signal, all processes save and
    stop together.

    Raises Interrupted at the first hook behind the batch that was saved, so that the batch's
    metrics are written too. A second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._saved = False
        self._update = -1  # the one that was saved

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTING:
                # Lightning restores the earlier handlers when the run ends.
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if number == self.received == signal.SIGINT:
            print("SIGINT: left without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)  # whatever the process is waiting for
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches % pl_module.accumulate:
            return
        self.received = self._of_all(trainer)
        if not self.received:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.save_at_once(trainer, pl_module)
        self._update = pl_module.updates
        # Else the validation that belongs to the update is made first.
        self._saved = not validates_now(trainer)

    def _of_all(self, trainer: L.Trainer) -> int:
        """The signal that any process received, 0 for none."""
        # Lightning noted one that came before training began.
        if self.received == 0 and trainer.received_sigterm:
            self.received = int(signal.SIGTERM)
        if not distributed.is_distributed():
            return self.received
        return max(distributed.gather_rows(torch.tensor([self.received])).tolist())

    def _leave(self, pl_module: Any) -> None:
        if self._saved:
            raise Interrupted(self.received, pl_module.updates)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._leave(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._leave(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved = self.received != 0 and pl_module.updates == self._update
