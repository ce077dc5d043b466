"""How many processes load data, what each does at its start, and the signals that end a run in order."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import TracebackType

import torch

#: Signals that end a run in order, see tessellar/callbacks/interruption.py.
INTERRUPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


MOST = 8
"""More processes than these rarely feed one GPU faster."""

GRACE = 0.5
"""Seconds that a process which ends gives its workers to end by themselves."""

_ends_workers_of: int | None = None  # the process whose end is already looked after


def sensible_workers() -> int:
    """Processes that load data where nobody said how many: this process's share of the cores, at
    most 8.

    None without a GPU, where they would take the cores that train.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST, max(1, (cores or 1) // max(here, 1)))


def attended() -> Callable[[int], None]:
    """`worker_init_fn` of every loader: `ignore_interruptions`, and no worker outlives the process
    that asks for it.
    """
    global _ends_workers_of
    if _ends_workers_of != os.getpid():
        Finalize(None, end_workers, exitpriority=0)
        _ends_workers_of = os.getpid()
    return ignore_interruptions


def end_workers() -> None:
    """End what is left of this process's daemons before `multiprocessing` does: it sends SIGTERM,
    which our workers ignore, and would wait for them without end.

    They are left where an error or a caller still holds a loader's iterator.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if not left:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    for child in left:
        child.terminate()
    until = time.monotonic() + GRACE
    for child in left:
        child.join(max(0.0, until - time.monotonic()))
        child.kill()


def ignore_interruptions(_: int) -> None:
    """The signals that the main process answers are not a worker's.

    Terminals, `timeout` and schedulers signal the whole process group. A worker that died of it
    would take along the main process, which still needs the batch under way before it saves.
    Workers end when the main process does, and then have nothing to say of it.
    """
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _silent_when_left


def _silent_when_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The thread that hands tensors over prints a traceback where the main process was killed just
    then. A loader's own errors take another way: to the main process.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@contextmanager
def starting_readers() -> Iterator[None]:
    """Programs that are started inside (`curl` of a stream) are not ended by these signals either:
    they inherit which ones this thread blocks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
