"""What the processes of a data loader do at their start."""

import signal

#: Signals that end a run in order, see tessellar/callbacks/interruption.py.
INTERRUPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def ignore_interruptions(_: int) -> None:
    """`worker_init_fn` of every loader: the signals that the main process answers are not a
    worker's.

    Terminals, `timeout` and schedulers signal the whole process group. A worker that died of it
    would take along the main process, which still needs the batch under way before it saves.
    Workers end when the main process does.
    """
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)
