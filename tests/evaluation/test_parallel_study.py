"""The study of fewer evaluations: its rows and runs, which exact row is compared, its tables."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import parallel, steps
from benchmarks.studies.parallel import (
    APPROXIMATE,
    EXACT,
    FLASH,
    LEARNED,
    best_exact,
    decoded,
    drafter,
    limits_table,
    llamagen,
    lpd,
    models_table,
    older,
    tokenizer,
)
from benchmarks.tradeoff import all_rows
from tessellar.errors import UserError

GIVEN = argparse.Namespace(
    runs=Path("runs"),
    samples=6400,
    tokenizer_samples=3200,
    early=640,
    drafter_samples=320,
    width=64,
    depth=2,
    timed=2,
    old=None,
    retrain_old=False,
)


def row(name: str, evaluations: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "seeds": [],
        "batch_1": {"evaluations_per_image": evaluations},
        **more,
    }


def test_its_twelve_rows_and_learned_steps_are_rows_of_the_trade_off() -> None:
    exact = {row.name: row.algorithm.exact for row in all_rows()}
    assert len(EXACT) + len(APPROXIMATE) == 12
    assert all(exact[name] for name in (*EXACT, *LEARNED) if name != FLASH)
    assert not any(exact[name] for name in APPROXIMATE)


def test_its_runs_have_configs_and_equal_samples() -> None:
    runs = [tokenizer(GIVEN), llamagen(GIVEN), lpd(GIVEN), drafter(GIVEN, 2.5)]
    assert len({run.name for run in runs}) == 4
    for run in runs:
        assert (steps.ROOT / run.config).is_file()
    updates = [run.options[run.options.index("--trainer.max_steps") + 1] for run in runs]
    assert updates == ["100", "200", "200", "10"]
    drafting = runs[3].options
    assert drafting[drafting.index("--model.init_args.generator.init_args.guidance") + 1] == "2.5"
    # Of an option that is given twice the last one counts: the drafter has one block.
    depth = "--model.init_args.generator.init_args.depth"
    assert drafting[len(drafting) - drafting[::-1].index(depth)] == "1"


def test_the_older_model_is_a_checkpoint_that_stays_unless_another_is_given() -> None:
    options = llamagen(GIVEN).options
    assert options[options.index("--keep_every") + 1] == "20"
    what, path = older(GIVEN)
    assert what == "old: this run's checkpoint at 640 samples"
    assert path == Path("runs/generator/checkpoints/update_00000020.ckpt")
    other = argparse.Namespace(**{**vars(GIVEN), "old": Path("x/export")})
    assert older(other)[1] == Path("x/export")


def test_the_older_model_is_trained_again_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def make(self: steps.Training, runs: Path, data: Path) -> Path:
        made.append(self)
        return self.folder(runs) / "export"

    monkeypatch.setattr(steps.Training, "make", make)
    again = argparse.Namespace(**{**vars(GIVEN), "retrain_old": True, "data": Path("data")})
    assert older(again) == ("old: 640 samples", Path("runs/old-generator/export"))
    (run,) = made
    assert run.config == llamagen(GIVEN).config
    assert run.options[run.options.index("--trainer.max_steps") + 1] == "20"


def test_the_best_exact_row_has_the_fewest_evaluations_and_no_drafter() -> None:
    rows = [row(name, 100.0 - number) for number, name in enumerate(EXACT)]
    rows.append(row(APPROXIMATE[0], 1.0))
    assert best_exact(rows) == EXACT[4]
    flash = next(one for one in rows if one["name"] == FLASH)
    flash["batch_1"]["evaluations_per_image"] = 2.0
    assert best_exact(rows) == EXACT[4]
    with pytest.raises(UserError, match="measure all exact rows first; missing: sjd 16 none"):
        best_exact([one for one in rows if one["name"] != "sjd 16 none"])


def test_a_row_that_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = argparse.Namespace(**{**vars(GIVEN), "runs": tmp_path})
    calls = []

    def command(script: str, *words: str) -> None:
        calls.append(words)
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps([row("zipar 4", 7.0)]))

    monkeypatch.setattr(parallel, "command", command)
    for _ in range(2):
        found = decoded(given, "zipar 4", Path("model"), "tradeoff", 1.5, "--images", "0")
        assert found["batch_1"]["evaluations_per_image"] == 7.0
    (words,) = calls
    assert words[:3] == ("model", "--rows", "^zipar\\ 4$") and words[-2:] == ("--images", "0")
    assert (tmp_path / "tradeoff" / "zipar-4").is_dir()


def test_tables_of_models_and_of_what_limits_them() -> None:
    training = {"samples_seen": 64_000, "cpu_seconds": 2000.4}
    model = {"name": "lpd-8", "training": training, "guidance": 2.0, "metrics": {"FD(a)": 1.234}}
    assert models_table([row("steps 8", 8, model=model)] * 2).splitlines()[2:] == [
        "| lpd-8 | 64,000 | 2,000 | 2 | 1.23 |"
    ]
    limit = {
        "name": "new model",
        "what": "new: 64,000 samples",
        "metrics": {"FD(a)": 1.5, "accuracy": 0.9},
        "dependence": {"entropy": 1.616, "overlaps": {"1": 0.871, "8": 0.8}},
        "best exact": "sjd 64 gumbel",
        "evaluations": 52.66,
        "fewer by": 4.861,
    }
    title, _, line = limits_table([limit]).splitlines()
    assert title == (
        "| model | FD(a) | nats a token | overlap after 1, 8 new tokens | best exact | evaluations | fewer by |"
    )
    assert (
        line == "| new: 64,000 samples | 1.50 | 1.62 | 0.87, 0.80 | sjd 64 gumbel | 52.7 | 4.86 |"
    )
