"""The measurements of cost run at tiny size and write what they promise; their figures are nobody's here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long


def results(name: str, folder: Path, *options: str) -> dict:
    out = folder / f"{name}.json"
    script = str(ROOT / "benchmarks" / f"{name}.py")
    subprocess.run(
        [sys.executable, script, "--tiny", "--rounds", "2", "--json", str(out), *options],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    return json.loads(out.read_text())


def test_a_step_has_the_loss_of_the_bare_loop(tmp_path: Path) -> None:
    found = results("training", tmp_path, "--precisions", "float32")
    (step,) = found["steps"]
    assert step["loss"] == pytest.approx(step["bare_loss"], rel=1e-5)
    levers = ["all", "AdamW in a loop", "EMA in a loop", "activations again", "loss in parts"]
    assert [row["lever"] for row in found["levers"]] == levers
    assert found["machine"]["float32_flops"] > 0


def test_memory_of_each_lever(tmp_path: Path) -> None:
    found = results("memory", tmp_path)
    together, parts = found["loss"]
    assert parts["bytes"] <= 0.4 * together["bytes"] and parts["loss_error"] <= 1e-6
    assert max(parts["states_gradient_error"], parts["weight_gradient_error"]) <= 1e-5
    assert found["checkpoints"][0]["ratio"] < 0.7


def test_growth_is_drawn(tmp_path: Path) -> None:
    found = results("growth", tmp_path, "--plot", "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert len(found["decoding_by_length"]) == len(found["training_by_length"]) == 2
    small, large = found["cache_by_images"].values()
    assert large > small
