"""What a command says comes next works when it is pasted."""

import logging
import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from tessellar.cli.main import dispatch

FEW = "--trainer.max_steps 1 --trainer.val_check_interval 1 --trainer.precision 32-true".split()
FEW += ["--trainer.accelerator", "cpu", "--data.batch_size", "4"]
NARROW = "--model.tokenizer.width 16 --model.tokenizer.decoder_depth 1".split()
NARROW += ["--model.tokenizer.num_heads", "2"]
NARROW_GENERATOR = "--model.generator.width 48 --model.generator.depth 1".split()


def told(lines: list[str], what: str) -> list[str]:
    """The words of the last command that the lines name for something."""
    found = [line for line in lines if re.match(rf"(next:|     ) {what}", line)]
    return shlex.split(re.search(r"tessellar (.*)", found[-1])[1])  # type: ignore[index]


def call(words: list[str], *more: str) -> None:
    assert not dispatch(words[0], [*words[1:], *more])


def test_from_a_tokenizer_to_samples(tmp_path: Path, monkeypatch, caplog) -> None:
    """In folders whose names a shell would cut; the validation share is not the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tessellar"])
    caplog.set_level(logging.INFO, "tessellar")
    for i in range(16):
        file = Path("my pictures", ("cat", "dog")[i % 2], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 70, 3), 15 * i, np.uint8)).save(file)
    data = ["--data.root", "my pictures", "--data.val_share", "0.25"]
    name = ["--name", "my run"]
    call(["train", "--config", "own_images/tokenizer", *name, *data, *FEW, *NARROW])
    cached = told(caplog.messages, "cache its tokens: ")
    assert cached[-4:] == ["--data.val_share", "0.25", "--out", "caches/my run"]
    call(cached, "--device", "cpu")
    assert Path("caches/my run/train/header.json").is_file()
    call(told(caplog.messages, ""), *FEW, *NARROW_GENERATOR)
    drawn = told(caplog.messages, "draw samples: ")
    call(drawn, "--count", "2", "--device", "cpu")
    assert Path("outputs/own_images-generator/samples.json").is_file()
    assert any(
        line == "2 images of 2 classes by runs/own_images-generator/export; writes "
        "outputs/own_images-generator"
        for line in caplog.messages
    )
    measured = told(caplog.messages, "measure it: ")
    assert measured[:3] == ["evaluate", "model", "runs/own_images-generator/export"]


def test_a_generators_config_beside_the_tokenizers_is_named(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tessellar"])
    caplog.set_level(logging.INFO, "tessellar")
    few = [*FEW, "--data.length", "16", "--data.val_length", "8"]
    call(["train", "--config", "demo/tokenizer", *few, *NARROW])
    words = told(caplog.messages, "train a generator on it: ")
    assert words[-2:] == ["--model.tokenizer", "runs/demo-tokenizer/export"]
    call(words, *few, *NARROW_GENERATOR)
    assert Path("runs/demo-generator/export").is_dir()
