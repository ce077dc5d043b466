"""The dispatcher: commands by name, mistakes in one line, exit codes, and the scripts at the checkout's root."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tessellar.cli import main as dispatcher
from tessellar.cli.errors import run
from tessellar.errors import UserError

ROOT = Path(__file__).parents[2]


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.dispatch(None, ["--help"]) == 0
    assert dispatcher.dispatch(None, []) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in dispatcher.COMMANDS)


def test_an_unknown_command_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'smaple' is not a command; .*did you mean 'sample'"):
        dispatcher.dispatch(None, ["smaple"])


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise UserError("no such thing")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert (
        run(lambda: None) == 0
        and run(lambda: 1) == 1
        and run(mistake) == 2
        and run(interrupt) == 130
    )
    assert capsys.readouterr().err.splitlines()[0] == "error: no such thing"
    assert run(lambda: 1 // 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_commands_print_what_the_package_logs(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("tessellar")
    level, handlers = log.level, log.handlers[:]
    log.handlers.clear()
    try:
        dispatcher.show_log()
        dispatcher.show_log()
        logging.getLogger("tessellar.checkpoints.reading").info("one line")
    finally:
        log.setLevel(level)
        log.handlers[:] = handlers
    assert capsys.readouterr().err == "one line\n"


def test_scripts_hand_over_to_their_command(tmp_path: Path) -> None:
    """From any folder, a mistake is one line on stderr and exit code 2."""
    command = [sys.executable, str(ROOT / "convert.py"), "verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr
        == f"error: {tmp_path} is not a folder of recorded outputs: it has no readable meta.json\n"
    )


@pytest.mark.parametrize("command", list(dispatcher.SCRIPTS))
def test_every_script_is_a_shim(command: str) -> None:
    lines = [line for line in (ROOT / f"{command}.py").read_text().splitlines() if line]
    assert lines == [
        "from tessellar.cli.main import main",
        'if __name__ == "__main__":',
        f'    main("{command}")',
    ]
