"""How commands end when something goes wrong: one line, a code, and a file for what nobody foresaw."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tessellar.cli import errors
from tessellar.errors import UserError


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of a test lands in the system's folder, nor in that of another test's run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    monkeypatch.setattr(errors, "_folder", None)
    (tmp_path / "system").mkdir()


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_nobody_foresaw_is_a_line_and_a_file_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors.put_tracebacks_into(tmp_path / "run")
    assert errors.run(raising(RuntimeError("sizes do\nnot fit"))) == 1
    file = tmp_path / "run" / "traceback.txt"
    assert told(capsys) == f"error: RuntimeError: sizes do not fit (traceback: {file})"
    assert "Traceback (most recent call last)" in file.read_text()
    assert "raise error" in file.read_text()


def test_without_a_run_the_file_is_in_the_systems_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(raising(KeyError("x" * 1000))) == 1
    files = list((tmp_path / "system").rglob("traceback.txt"))
    assert len(files) == 1 and f"(traceback: {files[0]})" in told(capsys)


def test_nobody_elses_link_leads_a_traceback_to_a_file_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder's name is known to all who share the machine."""
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "traceback.txt").write_text("thesis")
    planted = tmp_path / "system" / f"tessellar-{os.getuid()}"
    planted.symlink_to(treasure)
    assert errors.run(raising(KeyError("x"))) == 1
    planted.unlink()
    planted.mkdir()
    planted.chmod(0o777)
    (planted / "traceback.txt").symlink_to(treasure / "traceback.txt")
    assert errors.run(raising(KeyError("x"))) == 1
    assert (treasure / "traceback.txt").read_text() == "thesis"
    assert capsys.readouterr().err.count("(traceback: ") == 2


def test_a_folder_that_takes_no_file_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "system").rmdir()
    (tmp_path / "run").write_text("a file where a folder is expected")
    errors.put_tracebacks_into(tmp_path / "run")
    assert errors.run(raising(ZeroDivisionError())) == 1
    expected = "error: ZeroDivisionError (the traceback could not be written anywhere)"
    assert told(capsys) == expected


def test_names_from_files_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """A name may hold ends of lines and the codes that move a terminal's cursor."""
    assert errors.run(raising(UserError("photo \x1b[2J\nof\r a cat"))) == 2
    line = told(capsys)
    assert "\x1b" not in line and "\r" not in line
    assert line.startswith("error: photo ") and line.endswith(" a cat")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 2, "error: x.npz: No such"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_ends_that_are_foreseen(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(raising(error)) == code
    assert told(capsys).startswith(line)


def test_a_reader_that_has_gone_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(raising(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""
