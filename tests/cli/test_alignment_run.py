"""`train.py` on an alignment's YAML: from an export to an export, continued without its source."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tessellar
from tessellar.checkpoints.export import export_generator
from tessellar.cli import train
from tessellar.cli.errors import run
from tessellar.pipeline import ImageGenerator
from tests.training.conftest import make_generator_module

RUN: dict[str, Any] = {
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    },
    "ema": 0.5,
    "log_every": 1,
    "model": {
        "class_path": "tessellar.training.alignment_module.AlignmentModule",
        "init_args": {
            "source": "runs/generator/export",
            "method": {
                "class_path": "tessellar.training.alignment.VAPi",
                "init_args": {
                    "group_size": 2,
                    "kl": 0.1,
                    "reward": {"class_path": "tessellar.training.alignment.ReconstructionReward"},
                },
            },
            "optimizer": {"lr": 0.01},
        },
    },
    "data": {
        "class_path": "tessellar.data.ShapesData",
        "init_args": {"size": 16, "length": 32, "val_length": 8, "batch_size": 4},
    },
}


def test_a_run_begins_from_an_export_and_goes_on_without_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    source = export_generator(make_generator_module().model, "runs/generator/export")
    before = tessellar.load(source)
    Path("align.yaml").write_text(yaml.safe_dump(RUN))

    def call(*options: str) -> int:
        return run(lambda: train.main(["--config", "align.yaml", "--name", "a", *options]))

    assert call("--model.method.group_size", "1") == 2
    assert "group_size is 1" in capsys.readouterr().err
    assert call("--dry_run") == 0 and not Path("runs/a").exists()
    assert "operations:" in capsys.readouterr().out
    assert call() == 0
    assert re.search(r"sample(\.py)? runs/a/export", caplog.text)
    first = tessellar.load("runs/a/export")
    shutil.rmtree(source)
    assert call("--resume", "auto", "--trainer.max_steps", "3") == 0
    second = tessellar.load("runs/a/export")
    for made in (first, second):
        assert isinstance(made, ImageGenerator) and isinstance(before, ImageGenerator)
        assert made.class_names[0] == "circle"
        assert made.generator.config == before.generator.config
    assert not torch.equal(_weights(first), _weights(before))
    assert not torch.equal(_weights(second), _weights(first))
    metrics = Path("runs/a/metrics.csv").read_text()
    assert "train/reward" in metrics and "val/nats_per_image" in metrics


def _weights(model: Any) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.generator.parameters()])
