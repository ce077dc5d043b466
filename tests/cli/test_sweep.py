"""`tessellar sweep`: which runs it makes and takes, what it calls diverged, what it chooses and writes."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli import sweep as sweeping
from tessellar.cli import train
from tessellar.cli.errors import run
from tessellar.cli.main import dispatch
from tessellar.cli.sweep import with_points
from tessellar.errors import UserError
from tessellar.evaluation.trials import Trial, at_edge, best_trial, judged, smoothed
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.tiny.configs import tokenizer_run

RATES = ["--optimizer.lr", "1e-3", "1e-2", "1e3"]
BATCHES = ["--data.batch_size", "4", "8"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESSELLAR_RUNS", raising=False)
    Path("tok.yaml").write_text(yaml.safe_dump(tokenizer_run(8, 4, 4)))
    return "tok.yaml"


class Trained:
    """Stands for runs in processes of their own: writes what a run leaves, of a loss that is best at a
    rate of 1e-2, and that diverges above 1.
    """

    def __init__(self) -> None:
        self.words: list[list[str]] = []
        self.codes: dict[int, int] = {}  # exit codes by number of the call

    def __call__(self, words: Sequence[str]) -> tuple[int, str]:
        self.words.append(list(words))
        options = dict(zip(words, words[1:], strict=False))
        code = self.codes.get(len(self.words), 0)
        folder = Path("runs") / options["--name"]
        folder.mkdir(parents=True, exist_ok=True)
        rate = float(options["--model.optimizer.lr"])
        updates = int(options["--trainer.max_steps"])
        batch = int(options.get("--data.batch_size", 8))
        said: dict[str, Any] = {"status": "finished", "samples_seen": updates * batch}
        if code:
            said = {"status": "interrupted" if code == 143 else "running"}
        elif rate > 1:
            said = {"status": "failed", "error": "10 updates in a row; lower", "diverged": True}
            code = 2
        (folder / "run.json").write_text(json.dumps(said))
        if code:
            return code, "error: the last line"
        end = abs(torch.tensor(rate * 100).log10().item()) + 1 / batch
        with (folder / "metrics.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "train/loss", "val/psnr"])
            for update in range(1, updates + 1):
                rows.writerow([update, end + 10 * (1 - update / updates), ""])
        optimizer = {"name": "adamw", "lr": rate}
        made = yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}})
        (folder / "config.yaml").write_text(made)
        if not (folder / "export").exists():
            torch.manual_seed(0)
            tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 3, 2)
            export_tokenizer(tokenizer, folder / "export")
        return 0, ""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, config: str) -> Trained:
    made = Trained()
    monkeypatch.setattr(sweeping, "train", made)
    return made


def call(*words: str) -> int | None:
    return dispatch("sweep", list(words))


def test_points_are_runs_of_one_recipe_and_the_best_is_the_next_command(
    trained: Trained, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    further = ["--seed_everything", "3", "--trainer.accelerator", "cpu"]
    assert not call("--config", config, *RATES, *BATCHES, *further, "--updates", "40", "--out", "s")
    assert len(trained.words) == 6
    names = [dict(zip(w, w[1:], strict=False))["--name"] for w in trained.words]
    assert len(set(names)) == 6 and names[0].startswith("tok-lr_1e-3-batch_size_4-")
    for words in trained.words:
        options = dict(zip(words, words[1:], strict=False))
        assert options["--seed_everything"] == "3" and options["--resume"] == "auto"
        assert options["--trainer.max_steps"] == "40" and options["--log_every"] == "1"
    said = capsys.readouterr().out
    assert said.count("diverged: 10 updates in a row") == 2 and said.count("\n*") == 1
    result = json.loads(Path("s/sweep.json").read_text())
    assert result["chosen"] == {"model.optimizer.lr": "1e-2", "data.batch_size": "8"}
    values = [trial["value"] for trial in result["trials"]]
    # The mean of the last tenth: four of forty updates.
    assert values[3] == pytest.approx(1 / 8 + 10 * (0 + 1 + 2 + 3) / 4 / 40)
    assert values[4:] == [None, None] and min(filter(None, values)) == values[3]
    assert Path("s/sweep.png").stat().st_size > 5000
    (next_line,) = [line for line in said.splitlines() if line.startswith("next: ")]
    words = shlex.split(next_line.removeprefix("next: "))
    assert words[-4:] == ["--model.optimizer.lr", "1e-2", "--data.batch_size", "8"]
    assert "--trainer.max_steps" not in words and "3" in words and config in words
    assert "--data.batch_size 8 is the largest that was tried" in said
    assert "--model.optimizer.lr 1e-2 is" not in said  # between the others


def test_what_is_there_is_taken_and_more_values_add_to_it(trained: Trained, config: str) -> None:
    words = ["--config", config, "--updates", "10", "--out", "s"]
    call(*words, "--optimizer.lr", "1e-3", "1e3")
    assert len(trained.words) == 2
    call(*words, "--optimizer.lr", "1e-3", "1e-2", "1e3")  # the one that diverged is there too
    assert len(trained.words) == 3 and "1e-2" in trained.words[-1]
    # Of another recipe nothing is.
    Path(config).write_text(yaml.safe_dump(tokenizer_run(8, 4, 2)))
    call(*words, "--optimizer.lr", "1e-3", "1e-2")
    assert len(trained.words) == 5
    call("--config", config, "--out", "s", "--updates", "12", "--optimizer.lr", "1e-3", "1e-2")
    assert len(trained.words) == 7


def test_an_interrupted_sweep_ends_and_one_failed_run_does_not_end_it(
    trained: Trained, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", config, "--updates", "10", "--out", "s", "--optimizer.lr", "1e-3", "1e-2"]
    trained.codes = {2: 128 + 15}
    assert call(*words) == 143 and not Path("s/sweep.json").exists()
    trained.codes = {3: 2}  # options that do not fit
    with pytest.raises(UserError, match="--model.optimizer.lr 1e-2: the last line"):
        call(*words)
    trained.codes = {4: 137}
    call(*words)
    assert "failed: error: the last line" in capsys.readouterr().out
    assert json.loads(Path("s/sweep.json").read_text())["chosen"] == {"model.optimizer.lr": "1e-3"}


def test_samples_fix_the_length_whatever_the_batch(trained: Trained, config: str) -> None:
    words = ["--config", config, "--samples", "96", "--optimizer.lr", "1e-2"]
    call(*words, *BATCHES, "--model.accumulate", "2", "--out", "s")
    lengths = [dict(zip(w, w[1:], strict=False))["--trainer.max_steps"] for w in trained.words]
    assert lengths == ["12", "6"]
    call("--config", config, "--samples", "96", "--optimizer.lr", "1e-2", "1e-3", "--out", "s")
    assert "12" in trained.words[-1]  # the config's batch is 8
    with pytest.raises(UserError, match="give one"):
        call(*words, *BATCHES, "--updates", "3")


def test_the_preset_carries_what_was_chosen_to_other_widths(
    trained: Trained, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--model.optimizer.weight_decay", "0.05"]
    call("--config", config, *RATES, *BATCHES, *fixed, "--updates", "10", "--out", "s")
    preset = yaml.safe_load(Path("s/preset.yaml").read_text())
    assert preset["model"]["init_args"]["optimizer"] == {
        "name": "adamw",
        "weight_decay": 0.05,
        "lr": 0.01,
        "transfer": {"base_width": 16, "base_depth": 3},
    }
    assert preset["data"] == {"init_args": {"batch_size": 8}}
    assert "from 16 x 3 here" in capsys.readouterr().out
    # Laid over a config of twice the width: half the rate for hidden matrices.
    wide = tokenizer_run(1, 1, 1)
    wide["model"]["init_args"]["tokenizer"]["init_args"]["width"] = 32
    Path("wide.yaml").write_text(yaml.safe_dump(wide))
    cli = train.parse(["--config", "wide.yaml", "--config", "s/preset.yaml", "--name", "wide"])
    settings = cli.model.optimizer_settings
    assert settings.lr == 0.01 and settings.transfer.base_width == 16
    (optimizer,) = settings.make(cli.model.tokenizer)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert min(rates) == pytest.approx(0.01 / 2) and cli.datamodule.batch_size == 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer.lr", "1e-3"], "nothing is swept"),
        (["--trainer.max_steps", "3", *BATCHES], "--trainer.max_steps is set by the sweep: set"),
        (["--resume", "auto", *BATCHES], "goes on with what is there"),
        ([*BATCHES, "--share", "0"], "--share is 0"),
        ([*BATCHES, "--updates", "1"], "--updates is 1"),
        ([*BATCHES, "--samples", "64", "--model.accumulate", "x"], "give --model.accumulate a"),
        ([*BATCHES, "--metric", "val/fid", "--optimizer.lr", "1e-3"], "no such column"),
        ([*BATCHES, "--mode", "least"], "least"),
        ([*BATCHES, "--out", "tok.yaml"], "is a file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, trained: Trained, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: call("--config", config, *words)) == 2
    assert line in capsys.readouterr().err
    assert run(lambda: call("--config", "nowhere/tok", *BATCHES)) == 2


def test_words_with_several_values_are_swept_and_all_else_is_for_training() -> None:
    words = with_points(["a.yaml", "--optimizer.lr", "1", "2", "--ema=0.9", "--share", "0.2"])
    assert words[:3] == ["a.yaml", "--share", "0.2"]
    assert words[3] == '--axes={"model.optimizer.lr": ["1", "2"]}'
    assert words[4] == '--options=["--ema", "0.9"]'
    assert with_points(["--config", "a", "--config=b", "--help"]) == ["a", "b", "--help"]


def test_runs_are_judged_by_their_smoothed_end(tmp_path: Path) -> None:
    assert smoothed([(1, 4.0), (2, 2.0), (3, 0.0)], 0.5, 4) == [(1, 4.0), (2, 3.0), (3, 1.0)]
    trial = Trial({"lr": "1"}, "run", updates=4)

    def of(*values: float) -> Trial:
        lines = [f"{place},{value}" for place, value in enumerate(values, start=1)]
        path = tmp_path / "metrics.csv"
        path.write_text("\n".join(["step,train/loss", *lines]) + "\n")
        return judged(trial, path, "train/loss", "min", 0.25)

    assert of(4, 3, 2, 1).value == 1
    assert "ended at 5 after 4" in of(4, 3, 2, 5).fault
    assert "is nan at the end" in of(4, 3, 2, float("nan")).fault
    assert of(4).value == 4
    assert judged(trial, tmp_path / "metrics.csv", "train/loss", "max", 0.25).value == 4
    with pytest.raises(UserError, match="val/loss"):
        judged(trial, tmp_path / "metrics.csv", "val/loss", "min", 0.25)


def test_the_best_is_never_one_that_failed_and_edges_are_named() -> None:
    values = {"1": 3.0, "2": 2.0, "3": 1.0, "9": None}
    trials = [Trial({"lr": lr}, lr, 1, value=value) for lr, value in values.items()]
    assert best_trial(trials, "min").run == "3" and best_trial(trials, "max").run == "1"
    assert at_edge(trials, trials[2]) == []
    assert (
        "smallest" in at_edge(trials, trials[0])[0]
        and "largest" in at_edge(trials[:3], trials[2])[0]
    )
    words = [Trial({"name": name}, name, 1) for name in ("adamw", "muon")]
    assert at_edge(words, words[0]) == []
    with pytest.raises(UserError, match="no run came to an end: 9"):
        best_trial(trials[3:], "min")


def test_a_signal_reaches_the_run_and_ends_the_sweep(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Waiting(subprocess.Popen):
        def __init__(self, words: list[str], **options: Any) -> None:
            program = "import signal; print(1, flush=True); signal.pause()"
            super().__init__([sys.executable, "-c", program], stdout=subprocess.PIPE)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            assert self.stdout is not None
            if self.stdout.read(1):  # it runs, and waits for a signal
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(timeout)

    monkeypatch.setattr(sweeping.subprocess, "Popen", Waiting)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        call("--config", config, *RATES, "--updates", "4")
    assert ended.value.code == 143 and len(started) == 1
    assert started[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_runs_in_processes_of_their_own(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands for training above is what training does: one run ends, one diverges."""
    words = ["--config", config, "--optimizer.lr", "1e-2", "1e30", "--updates", "12"]
    assert not call(*words, "--model.max_skipped", "2", "--out", "s", "--name", "t")
    result = json.loads(Path("s/sweep.json").read_text())
    good, bad = result["trials"]
    assert good["value"] > 0 and good["samples"] == 96 and bad["value"] is None
    assert bad["fault"].startswith("diverged: 2 updates in a row of the tokenizer had no finite")
    assert len(list(Path("runs").glob("t-lr_*/metrics.csv"))) == 2
    assert "next: " in capsys.readouterr().out
