"""What becomes of a run when one of its processes is killed: one line, and nothing is left running.

Lightning starts the processes of `ddp` beside the first one. Every five seconds it looks whether one
has ended, and then kills all of them without a word, even while the first one says what happened or
still writes. Here a process has the time to end by itself; only one that hangs, as NCCL leaves it,
is ended. Under torchrun, which looks after its processes, nothing is done.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from tessellar.data.workers import INTERRUPTING

PERIOD = 0.5  # seconds between two looks
GRACE = 20.0  # seconds that a process has to end by itself once another one is gone
IN_ORDER = (0, *(128 + number for number in INTERRUPTING))  # exit codes of a run that was saved
OF_A_LOST_PROCESS = (
    "closed by peer",
    "Connection reset",
    "remote process exited",
    "Broken pipe",
    "NCCL communicator was aborted",
)


class Companions(L.Callback):
    """Watches, from each process that Lightning started or that started others, whether they live."""

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self._parent = os.getppid()
        self._is_child = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        processes = processes_beside(trainer)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if processes:
            for thread in threading.enumerate():
                if thread.name == "child-process-observer":
                    thread._child_processes = []  # type: ignore[attr-defined]  # it ends by itself
            watch = self._watch_children
        elif isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            self._is_child = True
            watch = self._watch_parent
        else:
            return
        threading.Thread(target=watch, args=(processes,), daemon=True).start()

    @property
    def first_lives(self) -> bool:
        """Whether another process is the run's first one, lives, and says itself what happened."""
        time.sleep(PERIOD if self._is_child else 0.0)  # its end is known a moment later
        return self._is_child and os.getppid() == self._parent

    def _watch_children(self, processes: list[subprocess.Popen]) -> None:
        while (said := first_that_failed(processes)) is None:
            time.sleep(PERIOD)
        time.sleep(self.grace)
        leave(said, processes)

    def _watch_parent(self, processes: list[subprocess.Popen]) -> None:
        while os.getppid() == self._parent:
            time.sleep(PERIOD)
        time.sleep(self.grace)
        leave("the first process of this run has ended", processes)


def processes_beside(trainer: L.Trainer) -> list[subprocess.Popen]:
    """The processes of `ddp` that Lightning started from this one."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    return [process for process in started if isinstance(process, subprocess.Popen)]


def first_that_failed(processes: list[subprocess.Popen]) -> str | None:
    """What became of the first process that ended out of order, None where none has."""
    for number, process in enumerate(processes, start=1):
        code = process.poll()
        if code is None or code in IN_ORDER:
            continue
        if code > 0:
            return f"process {number} of this run has ended with code {code}; its own line says why"
        name = signal.Signals(-code).name
        reason = " (out of memory?)" if name == "SIGKILL" else ""
        return f"process {number} of this run was ended by {name}{reason}"
    return None


def leave(line: str, processes: list[subprocess.Popen]) -> NoReturn:
    """End this process and those it started, whatever they wait for."""
    print(f"error: {line}; continue with --resume auto", file=sys.stderr, flush=True)
    end(processes)
    os._exit(2)


def end(processes: list[subprocess.Popen]) -> None:
    """Kill those that still live."""
    for process in processes:
        if process.poll() is None:
            process.kill()


def lost_process(
    error: BaseException, processes: list[subprocess.Popen] | None = None
) -> str | None:
    """What an error says about a data worker or a process of the run that has ended, None where it
    says nothing; `processes` are those that were started from here.
    """
    text = str(error)
    # A worker that dies while it hands a batch over shows as the end of the socket between them.
    torn = isinstance(error, (ConnectionError, EOFError)) or "ancdata" in text
    if torn or "DataLoader worker" in text:
        return "a data worker was killed or ended by itself (out of memory?)"
    if not any(words in text for words in OF_A_LOST_PROCESS):
        return None
    until = time.monotonic() + 2 * PERIOD  # its end may be known a moment later
    while processes and time.monotonic() < until:
        said = first_that_failed(processes)
        if said is not None:
            return said
        time.sleep(PERIOD / 10)
    return "another process of this run has ended"
