"""Training runs in processes of their own, to be signalled, killed and cut short from outside.

Each is `train.py` as a user calls it, in a session of its own as a shell or a scheduler makes one: a
signal to its group reaches its data workers too. The processes are forked from a server that has
imported the libraries once, so that a start costs a second and not ten.
"""

import csv
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds without a new update until a run is given up
MEETING = 45.0  # seconds that one of two processes waits for the other one


class AttackedRun:
    """One process of `train.py --config run.yaml --name NAME` in `folder`; `options` are added.

    `environment` adds variables, `largest` bounds the size of every file it writes, in bytes, as a
    full disk or a quota does. Its output lies in `<log>.out` and `<log>.err` of the folder.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        largest: int | None = None,
        log: str | None = None,
    ) -> None:
        self.run = folder / "runs" / name
        self.errors = folder / f"{log or name}.err"
        self._seen = self.errors.stat().st_size if self.errors.exists() else 0
        argv = ["--config", "run.yaml", "--name", name, *options]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tessellar.cli.train"])
        self.process = context.Process(
            target=train, args=(str(folder), argv, environment or {}, largest, log or name)
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def lives(self) -> bool:
        return self.process.is_alive()

    def wait_for(self, update: int) -> bool:
        """Whether the run logged `update` before it ended."""
        until = time.monotonic() + PATIENCE
        while last_update(self.run) < update and self.lives:
            if time.monotonic() > until:
                raise RuntimeError(f"{self.run.name} does not go on:\n{self.errors.read_text()}")
            time.sleep(0.003)
        return self.lives

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to all of its group."""
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    def children(self) -> list[int]:
        """Processes that it started and that live: its data workers."""
        file = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end; the exit code (minus the signal's number where one killed it), and what
        it said on stderr of that end.
        """
        reached = -1
        while self.lives and last_update(self.run) > reached:
            reached = last_update(self.run)
            self.process.join(PATIENCE)
        if self.lives:
            self.signal(signal.SIGKILL, group=True)
            self.process.join()
            raise RuntimeError(f"{self.run.name} did not end:\n{self.errors.read_text()}")
        said = self.errors.read_bytes()[self._seen :].decode(errors="replace")
        return self.process.exitcode or 0, [
            line for line in said.splitlines() if tells_of_end(line)
        ]


def tells_of_end(line: str) -> bool:
    """Whether a line on stderr is the run's last word, or what should never be seen."""
    return line.startswith(("error", "SIG", "interrupted")) or "Traceback" in line


def train(
    folder: str, argv: list[str], environment: dict[str, str], largest: int | None, log: str
) -> None:
    """What the process does: the command `train.py`, its output in files of the folder."""
    from tessellar.cli.main import main

    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a plain process
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    for number, ending in ((1, "out"), (2, "err")):
        with open(f"{log}.{ending}", "a") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["train.py", *argv]
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    main("train")


def end_with(parent: int) -> None:
    """Kill this process and its data workers once `parent` is gone: whoever attacked it."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, whole or not."""
    file = run / "metrics.csv"
    if not file.exists():
        return []
    with file.open() as text:
        return list(csv.DictReader(text))


def last_update(run: Path) -> int:
    """The update of the last row of a run's metrics, 0 before the first."""
    file = run / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.partition(",")[0] for line in lines[1:]]
    return int(found[-1]) if found and found[-1].isdigit() else 0


def as_torchrun_does(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of one of `world` processes on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "attacked",
        "TESSELLAR_MEETING": str(MEETING),
    }


def start_two(
    folder: Path, name: str, options: Sequence[str], port: int, largest: int | None = None
) -> list[AttackedRun]:
    """A run of two processes, as torchrun starts them."""
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *options]
    return [
        AttackedRun(
            folder,
            name,
            options=several,
            environment=as_torchrun_does(rank, 2, port),
            largest=largest,
            log=f"{name}.{rank}",
        )
        for rank in (0, 1)
    ]


def differing_rows(a: Path, b: Path) -> list[str]:
    """Where the metrics of two runs differ, but for speeds: steps that one lacks, cells as step/column."""
    first = {row["step"]: row for row in rows(a)}
    second = {row["step"]: row for row in rows(b)}
    found = [f"step {step}" for step in sorted(first.keys() ^ second.keys(), key=int)]
    for run in (a, b):
        steps = [row["step"] for row in rows(run)]
        if steps != sorted(set(steps), key=int):
            found.append(f"order of {run.name}")
    for step in first.keys() & second.keys():
        found += differing_cells(step, first[step], second[step])
    return found


def differing_cells(step: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Cells of one row that are not the same text in both; speeds are those of the machine."""
    columns = [name for name in a.keys() | b.keys() if not name.startswith("speed/")]
    return [
        f"{step}/{name}" for name in sorted(columns) if (a.get(name) or "") != (b.get(name) or "")
    ]
