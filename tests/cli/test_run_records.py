"""What a run leaves besides its weights: run.json, log.txt, milestones, settings, what to do next."""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import tessellar
from tessellar.callbacks.throughput import Throughput
from tessellar.checkpoints.card import command_line
from tessellar.cli import train
from tessellar.cli.errors import run

SMALL = (
    "--trainer.precision 32-true --trainer.max_steps 4 --trainer.val_check_interval 2 --log_every 1 "
    "--data.length 32 --data.val_length 8 --data.batch_size 8"
).split()
TOKENIZER = ["--config", "demo/tokenizer", *SMALL, "--model.tokenizer.width", "16"]
GENERATOR = ["--config", "demo/generator", *SMALL, "--model.generator.width", "48"]
JARGON = ("LightningModule", "global_step", "callback", "None", "dataloader", "rank", "tensor")


def call(*words: str) -> int:
    return run(lambda: train.main(list(words)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "tessellar")
    return tmp_path


def facts(name: str) -> dict:
    return json.loads(Path(f"runs/{name}/run.json").read_text())


def test_a_run_says_what_it_found_does_and_leaves(here: Path, caplog, capsys) -> None:
    options = "--keep_every 2 --export best --trainer.profiler simple"
    assert call(*TOKENIZER, "--name", "tok", *options.split()) == 0
    said = caplog.messages
    assert "data: shapes: 32 training and 8 validation images, 10 classes" in said
    assert any(line.startswith("writes runs/tok: checkpoints") for line in said)
    updates = [line for line in said if line.startswith("update ")]
    assert updates[-1].startswith("update 4 of 4: loss ") and "val/psnr" in updates[-1]
    assert any(re.match(r"next: measure it: .*evaluate.* model runs/tok/export", s) for s in said)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("tessellar")]
    for line in ours:
        assert "\n" not in line and len(line) < 300
        assert not [word for word in JARGON if re.search(rf"\b{word}\b", line)], line
    assert any("Profiler Report" in r.getMessage() for r in caplog.records)

    lines = Path("runs/tok/log.txt").read_text().splitlines()
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING) ")
    assert all(stamp.match(line) for line in lines)
    assert [stamp.sub("", line, count=1) for line in lines] == ours

    told = facts("tok")
    assert told["status"] == "finished" and told["started"] <= told["ended"]
    assert told["host"] and told["device_names"] and told["versions"]["torch"] == torch.__version__
    assert told["parts"][0]["status"] == "finished" and told["exported"] == "best.ckpt"
    assert sorted(p.name for p in Path("runs/tok/checkpoints").glob("update*")) == [
        "update_00000002.ckpt",
        "update_00000004.ckpt",
    ]
    second, last = (
        tessellar.load(f"runs/tok/checkpoints/{name}.ckpt").state_dict()
        for name in ("update_00000002", "last")
    )
    kept = tessellar.load("runs/tok/checkpoints/update_00000004.ckpt").state_dict()
    assert all(torch.equal(last[key], kept[key]) for key in last)
    assert any(not torch.equal(last[key], second[key]) for key in last)
    best = tessellar.load("runs/tok/checkpoints/best.ckpt").state_dict()
    exported = tessellar.load("runs/tok/export").state_dict()
    assert all(torch.equal(best[key], exported[key]) for key in best)
    settings = yaml.safe_load(Path("runs/tok/tensorboard/hparams.yaml").read_text())
    assert settings["model.optimizer.lr"] == 0.003 and settings["data.batch_size"] == 8
    assert "export: runs/tok/export" in capsys.readouterr().out


def test_a_failed_and_an_interrupted_run_say_so(here: Path, monkeypatch) -> None:
    words = (
        "--model.optimizer.lr",
        "1e30",
        "--model.max_skipped",
        "1",
        "--trainer.max_steps",
        "30",
    )
    assert call(*TOKENIZER, *words, "--name", "bad") == 2
    told = facts("bad")
    assert told["status"] == "failed" and "no finite gradient" in told["error"] and told["ended"]
    assert "ERROR" in Path("runs/bad/log.txt").read_text().splitlines()[-1]

    start = Throughput.on_train_batch_start

    def during(self, trainer, module, *given):
        start(self, trainer, module, *given)
        if module.updates == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patched:
        patched.setattr(Throughput, "on_train_batch_start", during)
        assert call(*TOKENIZER, "--name", "cut") == 128 + signal.SIGUSR1
    assert facts("cut")["status"] == "interrupted"
    assert call(*TOKENIZER, "--name", "cut", "--resume", "auto") == 0
    told = facts("cut")
    assert [part["status"] for part in told["parts"]] == ["interrupted", "finished"]
    assert (
        told["status"] == "finished" and len(Path("runs/cut/log.txt").read_text().splitlines()) > 6
    )


def test_a_refused_run_leaves_no_log(here: Path) -> None:
    assert call(*TOKENIZER, "--name", "no", "--data.size", "16") == 2
    assert not Path("runs").exists()


def test_a_renamed_tokenizer_run_does_not_break_its_generators(here: Path, caplog) -> None:
    assert call(*TOKENIZER, "--name", "old") == 0
    path = ("--model.tokenizer", "runs/old/export")
    assert call(*GENERATOR, *path, "--name", "gen") == 0
    assert any(
        re.match(r"next: draw samples: .*sample.* runs/gen/export", m) for m in caplog.messages
    )
    shutil.move("runs/old", "runs/new")
    longer = ("--resume", "auto", "--trainer.max_steps", "5")
    assert call(*GENERATOR, *path, "--name", "gen", *longer) == 0
    assert "is not there any more" in caplog.text and facts("gen")["updates"] == 5
    moved = ("--model.tokenizer", "runs/new/export", "--resume", "auto", "--trainer.max_steps", "6")
    assert call(*GENERATOR, *moved, "--name", "gen") == 0 and facts("gen")["updates"] == 6
    assert call("validate", *GENERATOR, *path, "--name", "gen", "--resume", "auto") == 0
    tessellar.load("runs/gen/export")


def test_the_last_is_exported_where_there_is_no_best(here: Path, caplog) -> None:
    words = ("--trainer.limit_val_batches", "0", "--export", "best", "--trainer.max_steps", "2")
    assert call(*TOKENIZER, *words, "--name", "last") == 0
    assert "there is no best.ckpt" in caplog.text and facts("last")["exported"] == "last.ckpt"


def test_a_command_is_quoted() -> None:
    words = ["train.py", "--data.root", "my pictures", "--data.shards", "{0..3}.tar", "a\nb"]
    text = command_line(words)
    assert text.startswith("python train.py --data.root 'my pictures' --data.shards '{0..3}.tar'")
    assert "\n" not in text
    assert command_line(["/usr/bin/tessellar", "train"]) == "tessellar train"
