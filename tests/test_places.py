"""Where runs lie: here, or where TESSELLAR_RUNS says; paths that begin with `runs/` are found there."""

import os
from pathlib import Path

import pytest

from tessellar.checkpoints.hub import is_hub_id
from tessellar.checkpoints.reading import read_source
from tessellar.errors import UserError
from tessellar.places import cache_folder, in_runs, put_runs_into, runs_root, runs_stay


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESSELLAR_RUNS", raising=False)
    return tmp_path


def test_runs_lie_here_unless_said_otherwise(here: Path, monkeypatch) -> None:
    assert runs_root() == Path("runs") and in_runs("runs/a/export") == Path("runs/a/export")
    assert cache_folder("runs/.cache") == Path("runs/.cache")
    monkeypatch.setenv("TESSELLAR_RUNS", str(here / "scratch"))
    assert in_runs("runs/a/export") == here / "scratch" / "a" / "export"
    assert cache_folder("runs/.cache/text") == here / "scratch" / ".cache" / "text"
    assert cache_folder("elsewhere") == Path("elsewhere")
    assert in_runs("exports/a") == Path("exports/a")
    Path("runs/a/export").mkdir(parents=True)
    assert in_runs("runs/a/export") == Path("runs/a/export")  # what is here comes first


def test_an_option_holds_for_one_command() -> None:
    with runs_stay():
        put_runs_into("/scratch")
        assert runs_root() == Path("/scratch") and os.environ["TESSELLAR_RUNS"] == "/scratch"
    assert runs_root() == Path("runs") and "TESSELLAR_RUNS" not in os.environ


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(here: Path, monkeypatch) -> None:
    monkeypatch.setenv("TESSELLAR_RUNS", str(here / "scratch"))
    assert not is_hub_id("runs/gen") and is_hub_id("owner/gen")
    with pytest.raises(UserError, match="runs/gen does not exist"):
        read_source("runs/gen")
