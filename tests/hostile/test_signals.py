"""Signals to whole runs in processes of their own: what is saved, what is said, and the exit code."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.attacked import AttackedRun, as_torchrun_does, last_update, start_two
from tessellar.training.base import STATE_KEY

SAVED = "saved and stopped after update {}; continue with --resume auto"
PORT = 20000 + os.getpid() % 20000
LATER = partial(pytest.param, marks=pytest.mark.long)


@pytest.fixture
def endless(tmp_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A run that does not end by itself in the time of a test, in the folder of the test."""
    config["trainer"] |= {"max_steps": 100000, "val_check_interval": 1000}
    config["save_every"] = 100000
    config["data"]["init_args"]["length"] = 80000
    write(tmp_path, config)
    return config


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def saved(run: Path) -> int:
    """The update that the run's last checkpoint is of; 0 without one."""
    path = run / "checkpoints" / "last.ckpt"
    if not path.exists():
        return 0
    return int(torch.load(path, weights_only=True)[STATE_KEY]["updates"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", LATER("SIGUSR1"), LATER("SIGHUP")])
def test_a_signal_to_the_whole_group_saves_with_data_workers_alive(
    tmp_path: Path, endless: dict[str, Any], name: str
) -> None:
    number = signal.Signals[name]
    run = AttackedRun(tmp_path, "x", ["--data.num_workers", "2"])
    assert run.wait_for(3) and len(run.children()) == 2
    run.signal(number, group=True)
    code, said = run.end()
    update = saved(run.run)
    assert code == 128 + number
    assert said == [f"{name}: {SAVED.format(update)}"] and update >= 3
    assert last_update(run.run) == update
    assert (run.run / "interrupted").read_text() == f"{said[0]}\n"


def test_an_interrupted_run_goes_on_and_loses_its_mark(
    tmp_path: Path, endless: dict[str, Any]
) -> None:
    run = AttackedRun(tmp_path, "x")
    assert run.wait_for(3)
    run.signal(signal.SIGINT)
    assert run.end()[0] == 130
    update = saved(run.run)
    again = AttackedRun(tmp_path, "x", ["--resume", "auto", "--trainer.max_steps", str(update + 2)])
    code, said = again.end()
    assert code == 0 and f"goes on after update {update} of" in again.errors.read_text(), said
    assert not (run.run / "interrupted").exists() and saved(run.run) == update + 2


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, endless: dict[str, Any]) -> None:
    """The first one waits for the validation of 20,000 batches that is under way."""
    endless["trainer"] |= {"val_check_interval": 3, "limit_val_batches": 20000}
    endless["data"]["init_args"]["val_length"] = 160000
    write(tmp_path, endless)
    run = AttackedRun(tmp_path, "x")
    assert run.wait_for(3)
    run.signal(signal.SIGINT, group=True)
    run.process.join(1)
    assert run.lives
    run.signal(signal.SIGINT, group=True)
    code, said = run.end()
    assert (code, said) == (130, ["SIGINT: left without saving"])
    assert saved(run.run) == 0 and last_update(run.run) == 3


def test_a_killed_data_worker_is_one_line(tmp_path: Path, endless: dict[str, Any]) -> None:
    run = AttackedRun(tmp_path, "x", ["--data.num_workers", "1", "--save_every", "2"])
    assert run.wait_for(4)
    os.kill(run.children()[0], signal.SIGKILL)
    code, said = run.end()
    assert code == 2 and len(said) == 1, said
    assert "error: a data worker was killed" in said[0]
    assert "continue with --resume auto" in said[0] and saved(run.run) >= 2


@pytest.mark.parametrize("name", ["SIGUSR1", LATER("SIGTERM")])
def test_a_signal_to_one_of_two_processes_saves_both(
    tmp_path: Path, endless: dict[str, Any], name: str
) -> None:
    first, second = start_two(tmp_path, "x", [], PORT)
    assert first.wait_for(3)
    second.signal(signal.Signals[name])
    number = 128 + signal.Signals[name]
    (code, said), (other, nothing) = first.end(), second.end()
    assert (code, other) == (number, number)
    assert said == [f"{name}: {SAVED.format(saved(first.run))}"] and nothing == []
    assert saved(first.run) >= 3 and (first.run / "interrupted").exists()


@pytest.mark.parametrize("killed", [1, LATER(0)])
def test_a_killed_process_of_two_is_one_line(
    tmp_path: Path, endless: dict[str, Any], killed: int
) -> None:
    both = start_two(tmp_path, "x", ["--save_every", "2"], PORT + 1)
    assert both[0].wait_for(4)
    both[killed].signal(signal.SIGKILL)
    assert both[killed].end()[0] == -signal.SIGKILL
    code, said = both[1 - killed].end()
    assert code == 2 and len(said) == 1, said
    assert said[0] == "error: another process of this run has ended; continue with --resume auto"


def test_a_process_that_waits_for_one_that_never_comes_says_so_and_ends(
    tmp_path: Path, endless: dict[str, Any]
) -> None:
    alone = {**as_torchrun_does(0, 2, PORT + 2), "TESSELLAR_MEETING": "1"}
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    code, said = AttackedRun(tmp_path, "x", options, environment=alone).end()
    line = "not all of the 2 processes of this run came within 1 seconds; give the command again"
    assert (code, said) == (2, [f"error: {line}"])
    assert not (tmp_path / "runs").exists()
