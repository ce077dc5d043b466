"""Values that make no sense are one line and take no name; what nobody foresaw is one line and a file."""

import logging
from pathlib import Path

import pytest

from tessellar.cli import errors
from tessellar.cli.main import OneLine
from tessellar.errors import UserError
from tessellar.training.optim import OptimizerSettings
from tessellar.training.schedules import Schedule

OPTIONS = [
    ("--log_every", "0"),
    ("--save_every", "0"),
    ("--save_every", "-3"),
    ("--ema", "nan"),
    ("--model.optimizer.lr", ".nan"),
    ("--model.optimizer.lr", "-1"),
    ("--model.optimizer.weight_decay", ".inf"),
    ("--model.schedule.warmup", "-3"),
    ("--model.schedule.decay_start", "1.5"),
    ("--model.clip", ".nan"),
    ("--trainer.devices", "-1"),
    ("--trainer.devices", "0"),
    ("--trainer.max_steps", "-5"),
    ("--trainer.log_every_n_steps", "2"),
    ("--data.length", "-5"),
    ("--data.length", "0"),
    ("--data.val_length", "-5"),
    ("--data.batch_size", "0"),
    ("--data.num_workers", "-1"),
    ("--data.seed", str(2**70)),
    ("--data.seed", "-1"),
    ("--seed_everything", str(2**70)),
    ("--name", "a\0b"),
    ("--name", "a\nb"),
    ("--name", "a\udcffb"),
    ("--name", "a" * 300),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_a_value_that_makes_no_sense_is_one_line(call, config, option: str, value: str) -> None:
    config["trainer"]["max_steps"] = 2
    code, said = call(config, option, value)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 400, said
    assert not Path("runs").exists()


def test_a_misspelt_metric_is_said(call, config, caplog: pytest.LogCaptureFixture) -> None:
    assert call(config, "--best_metric", "val/pnsr")[0] == 0
    said = [line for line in caplog.messages if "val/pnsr" in line]
    assert len(said) == 1 and "did not measure val/pnsr" in said[0] and "val/psnr" in said[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_have_ranges_that_nan_does_not_pass(value: float) -> None:
    for name in ("lr", "muon_lr", "eps", "weight_decay", "muon_momentum"):
        with pytest.raises(ValueError, match=f"optimizer.{name} "):
            OptimizerSettings(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer.betas"):
        OptimizerSettings(betas=(0.9, value))
    for name in ("decay_start", "final", "warmup_from", "final_weight_decay"):
        with pytest.raises(ValueError, match=f"schedule.{name} "):
            Schedule(**{name: value})  # type: ignore[arg-type]


def test_what_nobody_foresaw_is_one_line_and_its_traceback_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    def command() -> int:
        raise ZeroDivisionError("of a kind\nthat nobody foresaw")

    monkeypatch.setattr(errors, "_folder", tmp_path)
    assert errors.run(command) == 1
    file = tmp_path / "traceback.txt"
    expected = f"error: ZeroDivisionError: of a kind that nobody foresaw (traceback: {file})\n"
    assert capsys.readouterr().err == expected
    assert "Traceback" in file.read_text() and "test_values.py" in file.read_text()


def test_a_name_forges_no_line(capsys) -> None:
    name = "cats\nerror: all is well\r\x1b[2K"

    def command() -> int:
        raise UserError(f"{name} is no class")

    assert errors.run(command) == 2
    assert capsys.readouterr().err == "error: cats\\nerror: all is well\\r\\x1b[2K is no class\n"
    record = logging.LogRecord("tessellar", logging.WARNING, "", 0, "%s is corrupt", (name,), None)
    assert OneLine().format(record) == "cats\\nerror: all is well\\r\\x1b[2K is corrupt"
