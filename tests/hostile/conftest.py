"""Whole runs that are attacked: train.py in a folder of its own, on a model of seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessellar.cli import train
from tessellar.cli.errors import run
from tests.tiny.configs import tokenizer_run


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of a tiny tokenizer's run of six updates, to be changed at will."""
    return tokenizer_run(6, validate_every=3, save_every=2)


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
