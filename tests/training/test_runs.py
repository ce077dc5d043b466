"""A run's folder and its metrics file."""

from pathlib import Path

import pytest
import torch

from tessellar.errors import UserError
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.runs import Run


@pytest.mark.parametrize("name", ["", "..", "a/b", "/abs"])
def test_a_name_is_a_plain_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="plain folder name"):
        Run(name, tmp_path)


def save(path: Path) -> Path:
    """A small checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.arange(1000)}, path)
    return path


def test_resume_auto_takes_the_last_checkpoint_or_the_one_before(tmp_path: Path) -> None:
    run = Run("a", tmp_path, resume="auto")
    assert run.checkpoint is None  # nothing there yet: a start
    run.create()
    (run.folder / "config.yaml").touch()
    assert (
        Run("a", tmp_path, resume="auto").checkpoint is None
    )  # killed before its first checkpoint
    for name in ("previous.ckpt", "last.ckpt"):
        path = save(run.folder / "checkpoints" / name)
        assert Run("a", tmp_path, resume="auto").checkpoint == path


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_checkpoint_is_left_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a" / "checkpoints"
    previous, last = save(folder / "previous.ckpt"), save(folder / "last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage]
    )
    assert Run("a", tmp_path, resume="auto").checkpoint == previous
    assert "last.ckpt is damaged" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        Run("a", tmp_path, resume=str(last))


def test_another_runs_checkpoint_gives_no_right_to_a_taken_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "checkpoints" / "last.ckpt")
    theirs = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="exists"):
        Run("a", tmp_path, resume=theirs)
    assert Run("b", tmp_path, resume=theirs).checkpoint == Path(theirs)
    assert Run("c", tmp_path, resume=theirs).checkpoint == Path(theirs)


def test_wandb_is_offline_without_a_key_and_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    first = Run("a", tmp_path)
    logger = first.loggers(wandb="project")[-1]
    assert not first.folder.exists() and logger._offline  # type: ignore[attr-defined]
    first.create()
    first.begin("", {"command": "", "commit": ""})
    again = Run("a", tmp_path, resume="auto").loggers(wandb="project")[-1]
    assert again.version == logger.version and again.version is not None


def rows(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_metrics_of_one_step_share_a_row_and_columns_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.log_metrics({"a": 1.0}, step=1)
    file.log_metrics({"a": 2.0}, step=2)
    file.log_metrics({"b": 0.5}, step=2)
    file.finalize("success")
    assert rows(path) == ["step,a,b", "1,1,", "2,2,0.5"]


def test_a_resumed_run_keeps_what_it_does_not_make_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for start in (1, 3):  # the second run resumes from a checkpoint of step 2
        file = MetricsFile(path)
        for step in range(start, start + 4):
            file.log_metrics({"a": float(10 * start)}, step)
        file.finalize("success")
    assert rows(path) == ["step,a", "1,10", "2,10", "3,30", "4,30", "5,30", "6,30"]
