"""Signals and kills under the real launchers: torchrun with one and two processes, and Lightning's own `ddp`."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.attacked import last_update
from tessellar.training.base import STATE_KEY

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
RUN = Path("runs/x")
PR_SET_PDEATHSIG = 1
PATIENCE = 600.0  # seconds for the imports of two processes, one after the other, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
FORWARDED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout", "300")


def die_with_the_test() -> None:
    """Called in a new process: the kernel kills it when the one that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Launched:
    """A command in a session of its own; its output lies in `out` of the folder that it runs in."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open("out", "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_the_test,
            )

    def wait_for(self, update: int) -> None:
        until = time.monotonic() + PATIENCE
        while last_update(RUN) < update:
            assert time.monotonic() < until and self.process.poll() is None, self.said()
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def said(self) -> str:
        return Path("out").read_text()

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def launched(folder: Path, config: dict[str, Any]) -> Iterator[list[Launched]]:
    """Commands that are killed, with their children, when a test ends; `run.yaml` does not end by itself."""
    config["trainer"] |= {"max_steps": 100000, "val_check_interval": 1000}
    config["save_every"] = 100000
    config["data"]["init_args"]["length"] = 80000
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    commands: list[Launched] = []
    yield commands
    for command in commands:
        if command.process.poll() is None:
            for pid in (*command.children(), command.process.pid):
                os.kill(pid, signal.SIGKILL)
            command.process.wait()


def train(world: int, *options: str) -> tuple[str, ...]:
    several = (
        "--trainer.devices",
        str(world),
        "--trainer.strategy",
        "ddp" if world > 1 else "auto",
    )
    command = (str(ROOT / "train.py"), "--config", "run.yaml", "--name", "x")
    return (*command, *several, "--data.num_workers", "1", *options)


def saved() -> int:
    return int(torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)[STATE_KEY]["updates"])


def lines(command: Launched) -> list[str]:
    return [line for line in command.said().splitlines() if line.startswith(("error", "SIG"))]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_torchrun_hands_a_signal_on_and_waits_for_the_save(
    launched: list[Launched], name: str, world: int
) -> None:
    """Its exit code is 1 whatever the signal: a job script looks at the mark in the run's folder."""
    launched.append(command := Launched(*TORCHRUN, str(world), *FORWARDED, *train(world)))
    command.wait_for(3)
    command.process.send_signal(signal.Signals[name])
    assert command.end() == 1, command.said()
    update = saved()
    assert update >= 3 and (RUN / "interrupted").exists()
    line = f"{name}: saved and stopped after update {update}; continue with --resume auto"
    assert lines(command) == [line]


def test_processes_that_torchrun_leaves_behind_save_and_stop(launched: list[Launched]) -> None:
    """Without --signals-to-handle SIGUSR1 ends torchrun alone, at once."""
    launched.append(command := Launched(*TORCHRUN, "2", *train(2)))
    command.wait_for(3)
    command.process.send_signal(signal.SIGUSR1)
    assert command.end() == -signal.SIGUSR1
    until = time.monotonic() + PATIENCE
    while not lines(command):
        assert time.monotonic() < until, command.said()
        time.sleep(0.1)
    assert lines(command)[0].startswith("SIGHUP: saved and stopped after update")
    assert saved() >= 3 and (RUN / "interrupted").exists()


def test_ctrl_c_ends_both_processes_that_lightning_started(launched: list[Launched]) -> None:
    launched.append(command := Launched(*train(2)))
    command.wait_for(3)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.end() == 130, command.said()
    line = f"SIGINT: saved and stopped after update {saved()}; continue with --resume auto"
    assert lines(command) == [line]


@pytest.mark.parametrize("first", [True, False])
def test_a_killed_process_of_those_that_lightning_started_is_one_line(
    launched: list[Launched], first: bool
) -> None:
    launched.append(command := Launched(*train(2, "--save_every", "2")))
    command.wait_for(4)
    (second,) = [pid for pid in command.children() if is_rank(pid)]
    os.kill(command.process.pid if first else second, signal.SIGKILL)
    code = command.end()
    until = time.monotonic() + PATIENCE
    while not lines(command):
        assert time.monotonic() < until, command.said()
        time.sleep(0.1)
    if first:
        assert code == -signal.SIGKILL
        assert lines(command) == [
            "error: another process of this run has ended; continue with --resume auto"
        ]
    else:
        assert code == 2
        assert lines(command) == [
            "error: process 1 of this run was ended by SIGKILL (out of memory?); continue with --resume auto"
        ]
    assert saved() >= 2


def is_rank(pid: int) -> bool:
    """Whether a child is the other process of the run and not a data worker, which has the first one's environment."""
    return b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
