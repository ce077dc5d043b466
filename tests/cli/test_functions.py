"""Commands from functions: shell habits, and one line for every mistake."""

from dataclasses import dataclass
from typing import Literal

import pytest

from tessellar.cli.functions import run_functions
from tessellar.errors import UserError


@dataclass(frozen=True)
class Inner:
    scale: float = 1.0


def single(
    model: str, per_class: int = 4, inner: Inner = Inner(), grid: bool = True, npz: bool = False
) -> tuple:  # noqa: B008
    """Do one thing.

    Args:
        model: which
        per_class: how many
    """
    return model, per_class, inner.scale, grid, npz


def many(folders: list[str], case: list[str] | None = None, json: bool = False) -> tuple:
    """Do many things."""
    return folders, case, json


def choose(
    which: Literal["one", "two"] = "one",
    several: list[Literal["one", "two"]] | None = None,
    count: int | None = None,
) -> tuple:
    """Choose."""
    return which, several, count


COMMANDS = {"single": single, "many": many, "choose": choose}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("single m", ("m", 4, 1.0, True, False)),
        ("single m --per-class 7 --inner.scale=2 --no-grid --npz", ("m", 7, 2.0, False, True)),
        ("single --npz m --per_class=7 --grid false", ("m", 7, 1.0, False, True)),
        ("single --per-class -1 m", ("m", -1, 1.0, True, False)),
        ("many a", (["a"], None, False)),
        ("many a b/c --case x y --json", (["a", "b/c"], ["x", "y"], True)),
        ("many 1 2", (["1", "2"], None, False)),
        ("many a --case x --case=y,z", (["a"], ["x", "y", "z"], False)),
    ],
)
def test_words_reach_the_function(words: str, expected: tuple) -> None:
    assert run_functions(COMMANDS, words.split()) == expected


def test_a_single_function_needs_no_subcommand() -> None:
    assert run_functions(single, ["m", "--npz"]) == ("m", 4, 1.0, True, True)


def test_paths_behind_a_list_option_are_positional(tmp_path) -> None:
    assert run_functions(many, ["--case", "x", "y", str(tmp_path)]) == (
        [str(tmp_path)],
        ["x", "y"],
        False,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("single", "model"),
        ("single m --per-clas 3", "did you mean 'per_class'"),
        ("single m --inner.scal 3", "no option 'inner.scal'; did you mean 'scale'"),
        ("single m --per-class x", "--per_class: expected int, not 'x'"),
        ("single m extra", "extra"),
        ("singel m", "did you mean 'single'"),
        ("", "single, many, choose"),
        ("many", "folders"),
        ("choose --which on", "--which: expected 'one' or 'two', not 'on'; did you mean 'one'"),
        ("choose --several one four", "--several: expected 'one' or 'two', not 'four'"),
        ("choose --count x", "--count: expected int, not 'x'"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_functions(COMMANDS, words.split())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_help_shows_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_functions(COMMANDS, ["single", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Do one thing" in text and "how many" in text
