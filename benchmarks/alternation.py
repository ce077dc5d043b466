"""Commands that are timed side by side: each runs for a slice while the others stand still, so that a machine which
becomes slower for some minutes becomes slower for all of them.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, NamedTuple


class Started(NamedTuple):
    """A process, and the file that it prints to."""

    process: "subprocess.Popen[bytes]"
    file: IO[bytes]


class Ended(NamedTuple):
    """CPU seconds of a command and of all processes it waited for, and what it printed."""

    cpu_seconds: float
    output: str


def alternate(commands: Mapping[str, Sequence[str]], seconds: float = 2.0) -> dict[str, Ended]:
    """Run all commands to their end, in turns of so many seconds of the clock.

    A command whose processes are stopped takes no CPU time, and its own count of CPU time stands.
    Raises RuntimeError, with the end of what it printed, where one fails.
    """
    running: dict[str, Started] = {}
    ended: dict[str, Ended] = {}
    # Ended by a job's time limit, this process would leave the others standing still for ever.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        for name, words in commands.items():
            # A file: a pipe that nobody reads would stop a command that prints much.
            file = tempfile.TemporaryFile()  # noqa: SIM115
            # A group of its own: workers stop and go on with their parent.
            process = subprocess.Popen(
                list(words), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            os.killpg(process.pid, signal.SIGSTOP)
            running[name] = Started(process, file)
        while running:
            for name, one in list(running.items()):
                process = one.process
                os.killpg(process.pid, signal.SIGCONT)
                until = time.monotonic() + seconds
                usage = None
                while usage is None and time.monotonic() < until:
                    time.sleep(0.01)
                    usage = _usage_of_ended(process)
                if usage is None:
                    os.killpg(process.pid, signal.SIGSTOP)
                    continue
                del running[name]
                ended[name] = _ended(name, one, usage)
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in running.values():
            if one.process.returncode is None:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
            one.file.close()
    return ended


def _leave(number: int, frame: FrameType | None) -> None:
    """Handler of a signal: the exit code that shells give it."""
    raise SystemExit(128 + number)


def _usage_of_ended(process: "subprocess.Popen[bytes]") -> float | None:
    """CPU seconds of a process that ended just now; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _ended(name: str, one: Started, seconds: float) -> Ended:
    """What a process left; raises RuntimeError where that is an exit code."""
    one.file.seek(0)
    output = one.file.read().decode(errors="replace")
    one.file.close()
    if one.process.returncode:
        code = one.process.returncode
        raise RuntimeError(f"{name} ended with exit code {code}: {output[-2000:].strip()}")
    return Ended(seconds, output)
