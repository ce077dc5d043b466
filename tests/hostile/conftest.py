"""Whole runs that are attacked: train.py in a folder of its own, on a model of seconds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessellar.cli import train
from tessellar.cli.errors import run

TOKENIZER: dict[str, Any] = {
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    },
    "log_every": 1,
    "save_every": 2,
    "model": {
        "class_path": "tessellar.training.tokenizer_module.TokenizerModule",
        "init_args": {
            "tokenizer": {
                "class_path": "tessellar.tokenizers.vit_vq.ViTVQ",
                "init_args": {
                    "image_size": 16,
                    "width": 16,
                    "encoder_depth": 1,
                    "decoder_depth": 1,
                    "num_heads": 2,
                    "quantizer": {
                        "class_path": "tessellar.tokenizers.quantizers.vq.VectorQuantizer",
                        "init_args": {"vocab_size": 16, "dim": 4},
                    },
                },
            },
            "loss": {
                "class_path": "tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss",
                "init_args": {},
            },
        },
    },
    "data": {
        "class_path": "tessellar.data.ShapesData",
        "init_args": {"size": 16, "length": 64, "val_length": 16, "batch_size": 8},
    },
}


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of a tiny tokenizer's run of six updates, to be changed at will."""
    return copy.deepcopy(TOKENIZER)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run train.py on a config with further options; gives the exit code and what was printed on stderr."""

    def command(config: dict[str, Any], *options: str, name: str = "x") -> tuple[int, str]:
        Path("run.yaml").write_text(yaml.safe_dump(config))
        capfd.readouterr()
        code = run(lambda: train.main(["--config", "run.yaml", "--name", name, *options]))
        return code, capfd.readouterr().err

    return command
