"""What errors say of a process that was lost."""

import signal
import subprocess
import sys

import pytest

from tessellar.callbacks.companions import first_that_failed, lost_process

WORKER = "a data worker was killed or ended by itself (out of memory?)"
OTHER = "another process of this run has ended"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), WORKER),
        (ConnectionResetError(104, "Connection reset by peer"), WORKER),
        (EOFError(), WORKER),
        (RuntimeError("received 0 items of ancdata"), WORKER),
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), OTHER),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_a_lost_process_is_told_from_other_errors(error: Exception, line: str | None) -> None:
    assert lost_process(error) == line


def test_the_process_that_was_killed_is_named() -> None:
    orderly, killed = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    assert first_that_failed([orderly, killed]) is None
    killed.kill()
    killed.wait()
    said = lost_process(RuntimeError("Connection closed by peer"), [orderly, killed])
    assert said == "process 2 of this run was ended by SIGKILL (out of memory?)"
    orderly.kill()
    saved = subprocess.Popen([sys.executable, "-SEc", f"raise SystemExit({128 + signal.SIGTERM})"])
    saved.wait()
    assert first_that_failed([saved]) is None
