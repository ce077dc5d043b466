"""Commands that are timed side by side."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.alternation import alternate

COUNTS = "import time\nfor _ in range(20): print(time.monotonic(), flush=True); time.sleep(0.02)"
BUSY = "import time\nwhile time.process_time() < 0.5: pass"


def test_commands_take_turns_and_count_their_own_time() -> None:
    ended = alternate(
        {"one": [sys.executable, "-c", COUNTS], "other": [sys.executable, "-c", COUNTS]},
        seconds=0.1,
    )
    times = {name: [float(line) for line in one.output.split()] for name, one in ended.items()}
    assert {len(lines) for lines in times.values()} == {20}
    whole = sorted((moment, name) for name, moments in times.items() for moment in moments)
    turns = sum(a[1] != b[1] for a, b in zip(whole, whole[1:], strict=False))
    assert turns > 1  # one after the other would be one turn


def test_a_command_that_is_stopped_takes_no_time() -> None:
    commands = {"busy": [sys.executable, "-c", BUSY], "idle": [sys.executable, "-c", "pass"]}
    ended = alternate(commands, seconds=0.05)
    assert ended["busy"].cpu_seconds >= 0.5 > ended["idle"].cpu_seconds


def test_a_command_that_prints_much_or_fails() -> None:
    much = [sys.executable, "-c", "print('x' * 300000)"]
    assert len(alternate({"much": much})["much"].output) == 300001
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(RuntimeError, match="bad ended with exit code 3: what went wrong"):
        alternate(
            {"waits": waits, "bad": [sys.executable, "-c", "print('what went wrong'); exit(3)"]},
            seconds=0.2,
        )


def test_nothing_is_left_standing_still_where_the_measuring_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    waits = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = f"from benchmarks.alternation import alternate; alternate({{'a': [{sys.executable!r}, '-c', {waits!r}]}})"
    process = subprocess.Popen([sys.executable, "-c", script])
    while not mark.exists() or not mark.read_text():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
