"""A refused resume changes nothing, a good one keeps and says everything, a run without a checkpoint starts again."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.attacked import differing_rows, rows
from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.cli.report import write_report
from tessellar.errors import UserError
from tessellar.schedules import Schedule
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.runs import Run
from tessellar.training.tokenizer_module import TokenizerModule


def contents(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of `ended` lies, once the first test that needs it has made it."""
    return tmp_path_factory.mktemp("ended") / "x"


@pytest.fixture
def ended(call, config, kept: Path) -> Path:
    """`runs/x`, a run of the config that has made all its updates."""
    if kept.exists():
        shutil.copytree(kept, "runs/x")
    else:
        assert call(config)[0] == 0
        shutil.copytree("runs/x", kept)
    return Path("runs/x")


def test_a_refused_resume_changes_nothing(call, config, ended: Path) -> None:
    before = contents("runs")
    model = config["model"]["init_args"]
    for change in ({"encoder_depth": 2}, {"image_size": 8}, {"num_heads": 4}):
        kept = dict(model["tokenizer"]["init_args"])
        model["tokenizer"]["init_args"] |= change
        code, said = call(config, "--resume", "auto", "--trainer.max_steps", "9")
        assert code == 2 and said.count("\n") == 1, said
        assert contents("runs") == before
        model["tokenizer"]["init_args"] = kept
    config["data"]["init_args"]["batch_size"] = 100
    assert (
        call(config, "--resume", "auto", "--trainer.max_steps", "9")[0] == 2
        and contents("runs") == before
    )
    assert call(config, name="y")[0] == 2 and not Path("runs/y").exists()


def test_a_resume_keeps_every_config_and_says_what_differs(
    call, config, ended: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = (ended / "config.yaml").read_text()
    config["model"]["init_args"]["optimizer"] = {"lr": 0.5e-3}
    assert call(config, "--resume", "auto", "--trainer.max_steps", "8")[0] == 0
    assert "goes on after update 6 of runs/x/checkpoints/last.ckpt" in caplog.text
    assert (
        "model.optimizer.lr 0.0001 -> 0.0005" in caplog.text
        and "trainer.max_steps 6 -> 8" in caplog.text
    )
    assert Path("runs/x/config.0.yaml").read_text() == first
    assert "lr: 0.0005" in Path("runs/x/config.yaml").read_text()
    parts = json.loads(Path("runs/x/run.json").read_text())["parts"]
    assert [part["config"] for part in parts] == ["config.0.yaml", "config.yaml"]
    assert parts[1]["from"] == "runs/x/checkpoints/last.ckpt"
    groups = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert {group["peak_lr"] for group in groups} == {0.0005}

    assert call(config, "--resume", "auto", "--trainer.max_steps", "8")[0] == 0
    assert "already at 8 of 8 updates: raise --trainer.max_steps" in caplog.text


def test_a_resume_of_a_run_that_has_ended_changes_nothing(call, config, ended: Path) -> None:
    """Also where fewer updates are asked for than were made; where a kill came before the export, that is written."""
    before = contents("runs")
    for steps in ("6", "4"):
        assert call(config, "--resume", "auto", "--trainer.max_steps", steps)[0] == 0
        assert contents("runs") == before
    for file in Path("runs/x/export").iterdir():
        file.unlink()
    Path("runs/x/export").rmdir()
    assert call(config, "--resume", "auto")[0] == 0
    assert Path("runs/x/export/model.safetensors").exists()
    parts = json.loads(Path("runs/x/run.json").read_text())["parts"]
    assert [part["config"] for part in parts] == ["config.0.yaml", "config.yaml"]


def test_a_resume_with_other_rates_and_another_schedule_does_what_they_say(call, config) -> None:
    """Learning rate, decay, betas, schedule and average; another kind of optimizer is refused."""
    model = config["model"]["init_args"]
    model["optimizer"] = {"lr": 1e-3, "weight_decay": 0.1}
    model["schedule"] = {"decay": "cosine", "final_weight_decay": 0.4}
    assert call(config, "--ema", "0.9")[0] == 0
    before = contents("runs")
    model["optimizer"] = {"name": "muon"}
    code, said = call(config, "--resume", "auto", "--trainer.max_steps", "8")
    assert code == 2 and "optimizer" in said.splitlines()[-1], said
    assert contents("runs") == before

    model["optimizer"] = {"lr": 2e-3, "weight_decay": 0.3, "betas": [0.8, 0.9]}
    model["schedule"] = {"decay": "linear", "warmup": 20}
    assert call(config, "--resume", "auto", "--trainer.max_steps", "8", "--ema", "0.5")[0] == 0
    content = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)
    decayed, plain = content["optimizer_states"][0]["param_groups"]
    factor = Schedule("linear", warmup=20).factor(7, 8)
    for group in (decayed, plain):
        assert group["peak_lr"] == 2e-3 and group["lr"] == pytest.approx(2e-3 * factor)
        assert tuple(group["betas"]) == (0.8, 0.9)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert float(rows(Path("runs/x"))[-1]["train/lr_factor_tokenizer"]) == pytest.approx(factor)
    averages = [state for state in content["callbacks"].values() if "average" in state]
    assert [state["decay"] for state in averages] == [0.5]


def killing(
    monkeypatch: pytest.MonkeyPatch, owner: type, hook: str, batch: int, late: bool
) -> None:
    """This process dies by SIGKILL before or after a hook, as soon as `batch` batches were trained on."""
    original: Callable[..., Any] = getattr(owner, hook)

    def hooked(self: Any, *given: Any, **named: Any) -> Any:
        module = self if isinstance(self, TokenizerModule) else given[1]
        if module.batches >= batch and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, *given, **named)
        if module.batches >= batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, hook, hooked)


#: Where a run is killed: in which hook of whom, after how many batches, after the hook or before it.
KILLS = [
    (TokenizerModule, "on_train_batch_start", 5, False),
    (Checkpoints, "save", 4, True),
    pytest.param(Checkpoints, "on_validation_end", 6, True, marks=pytest.mark.long),
    pytest.param(TokenizerModule, "on_train_batch_start", 7, False, marks=pytest.mark.long),
    pytest.param(Checkpoints, "on_train_batch_end", 8, True, marks=pytest.mark.long),
    pytest.param(Checkpoints, "on_validation_end", 6, False, marks=pytest.mark.long),
    pytest.param(TokenizerModule, "on_validation_epoch_end", 12, False, marks=pytest.mark.long),
    pytest.param(Checkpoints, "on_train_end", 12, False, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of uninterrupted runs, by name, made by the first test that needs them."""
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.mark.parametrize(("owner", "hook", "batch", "late"), KILLS)
def test_metrics_of_a_killed_run_are_those_of_a_whole_one(
    call, config, monkeypatch: pytest.MonkeyPatch, whole, owner, hook: str, batch: int, late: bool
) -> None:
    """With accumulated batches: every row once, no column lost, those of validations included."""
    config["model"]["init_args"]["accumulate"] = 2
    if "run" not in whole:
        assert call(config, name="whole")[0] == 0
        whole["run"] = Path("runs/whole").rename(whole["folder"] / "whole")
    child = os.fork()
    if child == 0:
        killing(monkeypatch, owner, hook, batch=batch, late=late)
        call(config)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    code, said = call(config, "--resume", "auto")
    assert code == 0, said
    assert differing_rows(whole["run"], Path("runs/x")) == []
    assert any(row["val/psnr"] for row in rows(Path("runs/x")))


def test_auto_without_a_checkpoint_refuses_where_there_are_results(tmp_path: Path) -> None:
    for result in ("export/model.safetensors", "checkpoints/best.ckpt"):
        folder = tmp_path / result.split("/")[0]
        (folder / "a" / result).parent.mkdir(parents=True)
        (folder / "a" / result).write_text("")
        with pytest.raises(
            Exception, match="--resume auto: .* has no last.ckpt to continue from, but"
        ):
            Run("a", folder, resume="auto")
        with pytest.raises(Exception, match="exists; choose another --name"):
            Run("a", folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(Exception, match="exists; choose another --name"):
        Run("b", tmp_path)
    with pytest.raises(Exception, match="has no last.ckpt to continue from, but thesis.tex; use"):
        Run("b", tmp_path, resume="auto")


def test_a_run_that_came_to_nothing_is_started_again(call, config) -> None:
    """Nothing was saved: its rows and configs are replaced."""
    model = config["model"]["init_args"]
    model["optimizer"] = {"lr": 1.0e30}
    model["max_skipped"] = 2
    assert call(config, "--save_every", "100")[0] == 2
    assert Path("runs/x/metrics.csv").exists()
    code, said = call(config, "--model.optimizer.lr", "0.001")
    assert code == 0, said
    steps = [line.split(",")[0] for line in Path("runs/x/metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4", "5", "6"]
    assert not Path("runs/x/config.0.yaml").exists()


def test_files_of_the_start_are_not_needed_for_a_resume(call, config, ended: Path) -> None:
    """The source of a fine-tuning, and the tokenizer of a generator: the checkpoint holds both."""
    ended.rename("runs/source")
    config["model"]["init_args"]["init_from"] = "runs/source/export"
    assert call(config)[0] == 0
    generator = {
        "tokenizer": "runs/source/export",
        "generator": {
            "class_path": "tessellar.models.llamagen.LlamaGen",
            "init_args": {
                "width": 16,
                "depth": 1,
                "num_heads": 2,
                "num_classes": 10,
                "ffn_multiple_of": 8,
            },
        },
    }
    model = {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": generator,
    }
    other = {**config, "model": model}
    assert call(other, name="gen")[0] == 0
    Path("runs/source").rename("runs/elsewhere")
    for this, name in ((config, "x"), (other, "gen")):
        code, said = call(this, "--resume", "auto", "--trainer.max_steps", "8", name=name)
        assert code == 0, said


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "16-mixed"])
def test_a_precision_that_is_not_supported_is_refused_and_takes_no_name(
    call, config, precision: str
) -> None:
    code, said = call(config, "--trainer.precision", precision)
    assert code == 2 and said.count("\n") == 1, said
    assert "not supported: use bf16-mixed or 32-true" in said and not Path("runs").exists()


@pytest.mark.parametrize("computes, precision", [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_that_the_processor_only_emulates_is_left_and_said(
    call, config, monkeypatch: pytest.MonkeyPatch, caplog, computes: bool, precision: str
) -> None:
    monkeypatch.setattr("tessellar.cli.train.computes_bfloat16", lambda: computes)
    code, said = call(config, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1")
    assert code == 0, said
    assert ("trainer.precision is 32-true instead of bf16-mixed" in caplog.text) is not computes
    assert (
        yaml.safe_load(Path("runs/x/config.yaml").read_text())["trainer"]["precision"] == precision
    )


RUN_JSON = (
    '{"parts": 5}',
    '{"parts": ["a"]}',
    '{"parts": [null]}',
    '{"parts": {"a": 1}}',
    '{"data": 3}',
    "[1]",
    "\0",
)


@pytest.mark.parametrize("text", RUN_JSON)
def test_a_run_json_that_was_changed_stops_no_resume(ended: Path, text: str) -> None:
    """What it said of the parts before is lost, and said to be; their configs are still there."""
    (ended / "run.json").write_text(text)
    run = Run("x", resume="auto")
    run.begin("now: 1\n", {"command": "again", "commit": "", "name": "x"})
    run.end("finished")
    parts = json.loads((ended / "run.json").read_text())["parts"]
    assert parts[-1]["command"] == "again" and parts[-1]["status"] == "finished"
    assert (ended / "config.0.yaml").exists()
    assert write_report([ended], Path("report.html")).exists()


@pytest.mark.parametrize(
    "name", ("metrics.csv", "run.json", "config.yaml", "log.txt", "lock", "checkpoints/best.ckpt")
)
def test_a_pipe_in_the_folder_of_a_run_is_not_waited_for(ended: Path, name: str) -> None:
    (ended / name).unlink()
    os.mkfifo(ended / name)
    with pytest.raises(UserError, match=f"runs/x/{name} is a pipe or a device, not a file"):
        Run("x", resume="auto")


def metrics(content: bytes) -> tuple[MetricsFile, str]:
    """A run's metrics that held `content` when it went on after update 2; and what is there then."""
    path = Path("metrics.csv")
    path.write_bytes(content)
    file = MetricsFile(path)
    file.begin(2)
    file.log_metrics({"a": 1.0}, 3)
    return file, path.read_text()


def test_metrics_that_a_spreadsheet_wrote_are_read(folder: Path) -> None:
    """A byte order mark, line ends of two characters, quotes."""
    written = b'\xef\xbb\xbf"step","a"\r\n"1","0.5"\r\n"2","0.25"\r\n"3","7"\r\n'
    assert metrics(written)[1] == "step,a\n1,0.5\n2,0.25\n3,1\n"
    assert list(folder.glob("metrics.*.csv")) == []


@pytest.mark.parametrize(
    "content, unread",
    [
        (b"step;a\n1;0,5\n2;0,25\n", 3),
        (b"a,b\n1,2\n", 2),
        (b"step,step\n1,1\n", 2),
        (b"step,a,a\n1,1,2\n", 2),
        (b"step,a\nx,1\n2,1\n", 1),
        (b"step,a\n" + b"9" * 5000 + b",1\n2,1\n", 1),
        (b"step,a\n1\n2,1\n", 1),
        (b'step,a\n1,"' + b"1" * 200_000 + b"\n", 2),
        ("step,a\n1,1\n".encode("utf-16"), 2),
    ],
)
def test_metrics_that_were_changed_are_kept_as_they_were(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes, unread: int
) -> None:
    """Each time again, under another name; what can be read of them goes on."""
    for number in range(2):
        text = metrics(content)[1]
        assert text.startswith("step,a\n") and text.endswith("3,1\n")
        assert ("2,1\n" in text) == (unread == 1)
        assert (folder / f"metrics.{number}.csv").read_bytes() == content
    line = f"metrics.csv has {unread} lines that are no rows of a run; as it was it is kept as"
    assert caplog.text.count(line) == 2


def test_a_row_that_a_kill_cut_is_no_change(folder: Path) -> None:
    assert metrics(b"step,a\n1,0.5\n2,0.25\n3,0.1")[1] == "step,a\n1,0.5\n2,0.25\n3,1\n"
    assert list(folder.glob("metrics.*.csv")) == []
