"""Signals of terminals and schedulers: to the process, to its whole group, twice; a killed worker is one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, str(ROOT / "train.py"), "--config", "run.yaml", "--name", "x"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(config: dict, folder: Path, *options: str, workers: int = 1) -> subprocess.Popen:
    """A long run as the leader of a process group; returns when its first checkpoint is there."""
    config["trainer"] |= {"max_steps": 100_000, "val_check_interval": 10_000}
    config["data"]["init_args"] |= {"num_workers": workers, "length": 8000}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = subprocess.Popen(
        [*MAIN, *options],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    for _ in range(1200):
        if (folder / "runs/x/checkpoints/previous.ckpt").exists() or run.poll() is not None:
            return run
        time.sleep(0.1)
    return run


def update_of(folder: Path) -> int:
    return torch.load(folder / "runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"]


def workers_of(run: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_saves_although_there_are_workers(config, folder: Path, number: signal.Signals) -> None:
    run = start(config, folder)
    os.killpg(run.pid, number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 128 + number, said
    last = said.splitlines()[-1]
    assert last.startswith(f"{number.name}: saved and stopped after update {update_of(folder)};"), said
    assert "Traceback" not in said and "worker" not in said
    assert (folder / "runs/x/interrupted").read_text().strip() == last


def test_a_second_ctrl_c_leaves_at_once(config, folder: Path) -> None:
    config["save_every"] = 1
    run = start(config, folder, workers=0)
    for _ in range(50):  # until one falls into the update under way
        if run.poll() is None:
            run.send_signal(signal.SIGINT)
            run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in said


def test_a_killed_worker_is_one_line(config, folder: Path) -> None:
    run = start(config, folder)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    last = said.splitlines()[-1]
    assert run.returncode == 2 and "Traceback" not in said, said
    assert last.startswith("error: a data worker was killed") and last.endswith("continue with --resume auto")
