"""A run's page at Weights & Biases: when it is online, what it holds, and that a refused run makes none."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessellar.callbacks.grids import log_image
from tessellar.training.runs import Run
from tessellar.training.wandb_page import WandbOptions, WandbPage, is_online

NETRC = "machine api.wandb.ai\n  login user\n  password 0123456789\n"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nobody is logged in; gives the place of its netrc."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_a_login_counts_and_the_mode_is_respected(nobody: Path, monkeypatch) -> None:
    assert not is_online()
    nobody.write_text(NETRC)
    nobody.chmod(0o600)
    assert is_online()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.example")
    assert not is_online()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert is_online()
    for mode, online in (("offline", False), ("dryrun", False), ("disabled", True)):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert is_online() == online
    nobody.write_bytes(b"machine \xff\n")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    assert not is_online()


def page(folder: Path, **options: Any) -> tuple[Run, WandbPage]:
    run = Run("a", folder)
    logger = run.loggers("project", WandbOptions(**options))[-1]
    assert isinstance(logger, WandbPage)
    return run, logger


def test_a_mode_of_the_environment_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run, logger = page(tmp_path)
    _ = logger.experiment
    assert logger._experiment is None and not run.folder.exists()  # nothing before the run begins
    run.create()
    run.begin("", {"command": "", "commit": ""})
    logger.log_hyperparams({"model.optimizer.lr": 0.1})
    assert logger.experiment.config["model.optimizer.lr"] == 0.1
    assert os.environ["WANDB_MODE"] == "disabled" and not (run.folder / "wandb").exists()


def test_entity_group_tags_and_notes_reach_the_page(tmp_path: Path) -> None:
    _, logger = page(tmp_path, entity="lab", group="seeds", tags=("a", "b"), notes="why")
    made = logger._wandb_init
    assert (made["entity"], made["group"], made["tags"], made["notes"]) == (
        "lab",
        "seeds",
        ["a", "b"],
        "why",
    )
    assert made["resume"] == "allow" and made["id"] == logger.version
    _, bare = page(tmp_path)
    assert not {"entity", "group", "tags", "notes"} & set(bare._wandb_init)


def test_pictures_have_their_step_and_the_export_is_an_artifact(
    tmp_path: Path, monkeypatch
) -> None:
    run, logger = page(tmp_path)
    run.begun = True
    sent: dict[str, Any] = {}
    experiment = SimpleNamespace(
        log=lambda values, **_: sent.update(values),
        log_artifact=lambda made: sent.update(artifact=made),
    )
    monkeypatch.setattr(WandbPage, "experiment", property(lambda self: experiment))
    log_image(logger, "samples", torch.zeros(3, 4, 4, dtype=torch.uint8), 70)
    assert sent["trainer/global_step"] == 70 and "samples" in sent
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.yaml").write_text("kind: tokenizer\n")
    logger.send_export(tmp_path / "export")
    assert sent["artifact"].type == "model" and "config.yaml" in sent["artifact"].manifest.entries
