"""A refused resume changes nothing, a good one keeps and says everything, a run without a checkpoint starts again."""

import json
from pathlib import Path

import pytest
import torch

from tessellar.training.runs import Run


def contents(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_a_refused_resume_changes_nothing(call, config, caplog: pytest.LogCaptureFixture) -> None:
    assert call(config)[0] == 0
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
    call, config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert call(config)[0] == 0
    first = Path("runs/x/config.yaml").read_text()
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


def test_files_of_the_start_are_not_needed_for_a_resume(call, config) -> None:
    """The source of a fine-tuning, and the tokenizer of a generator: the checkpoint holds both."""
    assert call(config, name="source")[0] == 0
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
