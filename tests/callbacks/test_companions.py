"""What errors say of a process that was lost."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tessellar.callbacks.companions import MEETING, first_that_failed, lost_process, meeting
from tessellar.errors import UserError

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


def waiting(processes: list[subprocess.Popen]) -> Any:
    """A trainer of two processes that wait for each other, of which it started `processes`."""
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=processes))
    return SimpleNamespace(num_nodes=1, num_devices=2, strategy=strategy)


def test_a_process_that_is_killed_before_the_meeting_ends_the_wait(
    capfd: pytest.CaptureFixture,
) -> None:
    child = os.fork()
    if child == 0:
        killed = subprocess.Popen(["sleep", "60"])
        killed.kill()
        with meeting(waiting([killed]), give_up=lambda: None):
            time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    line = "process 1 of this run was ended by SIGKILL (out of memory?); give the command again"
    assert capfd.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_wait_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv(MEETING, seconds)
    with pytest.raises(UserError, match=f"TESSELLAR_MEETING is '{seconds}'"):
        with meeting(waiting([]), give_up=lambda: None):
            pass
