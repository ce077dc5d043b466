"""What becomes of a run when one of its processes is killed: one line, and nothing is left running.

Lightning starts the processes of `ddp` beside the first one. Every five seconds it looks whether one
has ended, and then kills all of them without a word, even while the first one says what happened or
still writes. Here a process has the time to end by itself; only one that hangs, as NCCL leaves it,
is ended. Under torchrun, which looks after its processes, nothing is done.

Before they have met, torch waits half an hour for a process that will not come, whoever started it:
`meeting` says so and ends the wait.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from tessellar.data.workers import INTERRUPTING
from tessellar.errors import UserError

log = logging.getLogger(__name__)
MEETING = "TESSELLAR_MEETING"  # the environment's longest wait for all processes, in seconds
LONGEST_MEETING = 600.0
TOLD = 60.0  # seconds after which the wait is told
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
        if processes:
            end_observer()
            watch = self._watch_children
        elif is_started_beside(trainer):
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


@contextmanager
def meeting(trainer: L.Trainer, give_up: Callable[[], None]) -> Iterator[None]:
    """Until the processes of a run have met, end this one where one of them will not come, after
    `give_up`.

    Such a process was killed, or it never started. The wait has a limit, `TESSELLAR_MEETING` seconds
    of the environment, and is told after a minute. Raises UserError where that is no such number.
    """
    ended = threading.Event()
    if trainer.num_nodes * trainer.num_devices > 1:
        watch = threading.Thread(
            target=_watch_meeting, args=(trainer, longest_meeting(), give_up, ended), daemon=True
        )
        watch.start()
    try:
        yield
    finally:
        ended.set()


def longest_meeting() -> float:
    text = os.environ.get(MEETING, str(LONGEST_MEETING))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # so written, NaN is refused as well
        raise UserError(f"{MEETING} is {text!r}; it must be a number of seconds above 0")
    return seconds


def _watch_meeting(
    trainer: L.Trainer, longest: float, give_up: Callable[[], None], ended: threading.Event
) -> None:
    world = trainer.num_nodes * trainer.num_devices
    parent = os.getppid()
    since = time.monotonic()
    is_told = False
    while not (dist.is_initialized() or ended.wait(PERIOD)):
        waited = time.monotonic() - since
        processes = processes_beside(trainer)
        end_observer()
        said = first_that_failed(processes)
        if said is None and is_started_beside(trainer) and os.getppid() != parent:
            said = "the first process of this run has ended"
        if said is None and waited > longest:
            said = f"not all of the {world} processes of this run came within {longest:g} seconds"
        if said is not None:
            give_up()
            leave(said, processes, then="give the command again")
        if waited > TOLD and not is_told:
            log.warning("waits for the other processes of this run, which are %d in all", world)
            is_told = True


def end_observer() -> None:
    """End Lightning's own watch of the processes that it started."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # it ends by itself


def is_started_beside(trainer: L.Trainer) -> bool:
    """Whether Lightning started this process beside the run's first one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


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


def leave(
    line: str, processes: list[subprocess.Popen], then: str = "continue with --resume auto"
) -> NoReturn:
    """End this process and those it started, whatever they wait for."""
    print(f"error: {line}; {then}", file=sys.stderr, flush=True)
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
