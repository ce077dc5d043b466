"""Four processes: a checkpoint of several files loads on one, two and four; HSDP and tensor parallelism train as one
process does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tessellar.checkpoints.sharded import read_sharded

SCRIPT = Path(__file__).with_name("one_rank_of_parallel.py")
pytestmark = pytest.mark.long


def start(folder: Path, world: int, *tasks: str) -> None:
    """Run tasks in `world` processes; raises AssertionError with what they said where one fails."""
    port = 20000 + (os.getpid() + world) % 20000
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"},
    }
    outputs = [(folder / f"rank{rank}-{world}.txt").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *tasks],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [Path(output.name).read_text()[-3000:] for output in outputs]
    assert codes == [0] * world, "".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    start(folder, 4, "save", "load", "hybrid", "tensor")
    start(folder, 2, "load")
    one = runpy.run_path(str(SCRIPT))
    one["main"](folder, ["load"])
    one["train"](folder, "whole", "auto", 5)
    return folder


def result(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sharded_checkpoint_loads_in_any_number_of_processes(folder: Path, world: int) -> None:
    """Equal to the saved tensors bit for bit, and the next five losses to 1e-5."""
    saved = read_sharded(folder / "saved" / "update_00000003.ckpt")
    loaded = result(folder, f"load-{world}")
    start = loaded["start"]
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(start["state_dict"][name], tensor), name
    (averages,) = (state["average"] for state in saved["callbacks"].values() if "average" in state)
    assert averages and all(torch.equal(start["ema"][name], averages[name]) for name in averages)
    (moments,) = saved["optimizer_states"]
    (found,) = start["states"]
    assert len(found) == len(moments["state"]) > 10
    by_sizes: list[list[tuple]] = [[], []]
    for kept, state in zip(by_sizes, (found, moments["state"]), strict=True):
        for values in state.values():
            kept.append((values["exp_avg"].flatten(), values["exp_avg_sq"].flatten()))
    for ours, theirs in zip(*by_sizes, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    expected = result(folder, "save-4")["losses"][3:]
    assert len(loaded["losses"]) == 5
    assert loaded["losses"] == pytest.approx(expected, rel=1e-5)


def test_the_parts_of_four_processes_lie_in_four_files(folder: Path) -> None:
    saved = folder / "saved" / "update_00000003.ckpt"
    assert len(list(saved.glob("__*.distcp"))) == 4


@pytest.mark.parametrize("task", ["hybrid", "tensor"])
def test_two_times_two_processes_train_as_one(folder: Path, task: str) -> None:
    run = result(folder, f"{task}-4")
    one = result(folder, "whole-1")
    assert run["losses"] == pytest.approx(one["losses"], rel=1e-5)
    torch.testing.assert_close(run["weights"], one["weights"], atol=1e-4, rtol=1e-4)
