"""Two processes train as one does: DDP and FSDP2, both modules, with everything that looks at a batch; and go on from
each other's checkpoints."""

import fcntl
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("one_rank_of_training.py")
RUNS = [(kind, strategy) for kind in ("tokenizer", "generator") for strategy in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(one: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, then those of two; made once, whichever of pytest's workers is first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "training"
    with (root / "training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make_runs(one, folder)
            (folder / "made").touch()
    return folder


def make_runs(one: dict[str, Any], folder: Path) -> None:
    one["write_network"](folder)
    for kind in ("tokenizer", "generator"):
        one["train"](kind, "auto", folder, f"{kind}-one", save_at=one["SAVE_AT"])
        one["train"](kind, "auto", folder, f"{kind}-whole")
    port = 20000 + os.getpid() % 20000
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"},
    }
    outputs = [(folder / f"rank{rank}.txt").open("w+") for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=outputs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join(
        (folder / f"rank{rank}.txt").read_text()[-3000:] for rank in (0, 1)
    )


def result(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal(run: dict[str, Any], expected: dict[str, Any], last: int | None = None) -> None:
    """Losses to 1e-5 (of the last batches), weights and averages as far as Adam lets rounding grow."""
    count = len(run["losses"])
    assert count == (last or len(expected["losses"]))
    assert run["losses"] == pytest.approx(expected["losses"][-count:], rel=1e-5)
    for part in ("weights", "ema"):
        torch.testing.assert_close(run[part], expected[part], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "strategy"), RUNS)
def test_two_processes_train_as_one_with_the_same_global_batch(
    folder: Path, kind: str, strategy: str
) -> None:
    two, one = result(folder, f"{kind}-{strategy}-2"), result(folder, f"{kind}-whole-1")
    assert_equal(two, one)
    first, second = two["seen"]
    assert not set(first) & set(second) and sorted(first + second) == sorted(one["seen"][0])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_measure_the_distance_of_one(folder: Path, strategy: str) -> None:
    two = result(folder, f"generator-{strategy}-2")["distances"]
    one = result(folder, "generator-one-1")["distances"]
    assert set(one) == {"val/FD(tiny)", "val/FD(tiny) raw"} and one["val/FD(tiny)"] > 0
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize(("kind", "strategy"), RUNS)
def test_two_processes_continue_their_run_to_the_bit(
    folder: Path, kind: str, strategy: str, one
) -> None:
    """Also in the middle of an accumulated update, though the second run validates and draws on the way."""
    whole, again = (
        result(folder, f"{kind}-{strategy}-2"),
        result(folder, f"{kind}-{strategy}-again-2"),
    )
    assert again["losses"] == whole["losses"][one["SAVE_AT"] :]
    for part in ("weights", "ema"):
        torch.testing.assert_close(again[part], whole[part], atol=0, rtol=0)


@pytest.mark.parametrize(("kind", "strategy"), RUNS)
def test_two_processes_continue_the_run_of_one(folder: Path, kind: str, strategy: str, one) -> None:
    two, whole = result(folder, f"{kind}-{strategy}-from-one-2"), result(folder, f"{kind}-whole-1")
    assert_equal(two, whole, len(whole["losses"]) - one["SAVE_AT"])
    assert two["metrics"] == pytest.approx(whole["metrics"], rel=1e-4)


@pytest.mark.parametrize(("kind", "strategy"), RUNS)
def test_one_process_continues_the_run_of_two(folder: Path, kind: str, strategy: str, one) -> None:
    name = f"{kind}-{strategy}"
    run, whole = (
        one["train"](kind, "auto", folder, f"{name}-by", resume=f"{name}.ckpt"),
        f"{kind}-whole-1",
    )
    assert_equal(run, result(folder, whole), len(run["losses"]))
    assert len(run["losses"]) == len(result(folder, whole)["losses"]) - one["SAVE_AT"]


def test_two_processes_draw_the_images_of_one(folder: Path, one) -> None:
    """From the checkpoint of a sharded run."""
    one["draw"](folder, "alone")
    names = [
        sorted(path.name for path in (folder / name).rglob("*.png")) for name in ("alone", "two")
    ]
    assert names[0] == names[1] and len(names[0]) == 8  # 7 images and their grid
    for path in (folder / "alone").rglob("*.png"):
        assert (
            path.read_bytes() == (folder / "two" / path.relative_to(folder / "alone")).read_bytes()
        )
