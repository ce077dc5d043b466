"""One and two processes give the same record; every image is counted once though the shares are uneven."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessellar.evaluation.networks.timm_network import network_of
from tessellar.networks.facts import NetworkFacts

SCRIPT = Path(__file__).with_name("one_rank.py")
SAMPLES, REFERENCE = 77, 121  # odd, and no multiples of the batch size


@pytest.fixture(scope="module")
def folder(
    tiny_file: Path,
    random_images: Callable[..., Tensor],
    write_npz: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copy(tiny_file, folder / "tiny.safetensors")
    facts = NetworkFacts("headless", "test_resnet", 0, (32, 32))
    state = network_of(facts).state_dict()
    save_file(state, folder / "headless.safetensors", metadata=facts.to_metadata())
    write_npz(random_images(SAMPLES, seed=1), folder / "samples.npz", torch.arange(SAMPLES) % 4)
    write_npz(random_images(REFERENCE, seed=2, smooth=10), folder / "reference.npz")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    commands = [[sys.executable, str(SCRIPT), str(rank), "2", str(folder)] for rank in (0, 1)]
    processes = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.communicate()[1]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_give_the_record_of_one(two: list[dict], folder: Path) -> None:
    one = runpy.run_path(str(SCRIPT))["evaluate"](folder, "cache-1")
    for rank in two:
        record = rank["record"]
        assert record["fingerprint"] == one["fingerprint"] and record["samples"] == one["samples"]
        assert (
            record["reference"] == one["reference"] and record["reference"]["images"] == REFERENCE
        )
        assert record["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert record["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_only_one_process_writes_the_cache(two: list[dict], folder: Path) -> None:
    assert len(list((folder / "cache-2").iterdir())) == 2


def test_collective_operations(two: list[dict]) -> None:
    assert [rank["share"] for rank in two] == [[0, 2, 4], [1, 3]]
    for rank in two:
        assert rank["gathered"] == [0, 1, 2] and rank["broadcast"] == "from 0"
        assert rank["objects"] == [{"rank": 0}, {"rank": 1}]
