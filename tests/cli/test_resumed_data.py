"""A resumed run finds the data that it was trained on, or says in one line what is different."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tessellar.checkpoints.data_facts import DATA_KEY, facts_in
from tessellar.cli import train
from tessellar.cli.errors import run
from tests.tiny.configs import tokenizer_model

CLASSES = ("circle", "square", "triangle")
TOKENIZER = tokenizer_model()
GENERATOR = {
    "class_path": "tessellar.training.generator_module.GeneratorModule",
    "init_args": {
        "tokenizer": "runs/tok/export",
        "generator": {
            "class_path": "tessellar.models.llamagen.LlamaGen",
            "init_args": {
                "width": 16,
                "depth": 1,
                "num_heads": 2,
                "num_classes": 3,
                "ffn_multiple_of": 8,
            },
        },
    },
}
TRAINER = {
    "accelerator": "cpu",
    "check_val_every_n_epoch": None,
    "val_check_interval": 2,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
}
LAST = "checkpoints/last.ckpt"


def picture(path: Path, size: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(abs(hash(path.name)) % 100).integers(
        0, 256, (size, size, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).save(path)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
) -> Callable[..., tuple[int, str]]:
    """Run train.py over the folder `d`; gives the exit code, and the errors and warnings it printed."""
    monkeypatch.chdir(tmp_path)
    for name in CLASSES:
        for number in range(12):
            picture(Path("d") / name / f"{number}.png")

    def command(
        model: dict[str, Any], name: str, steps: int, *options: str, action: str = "fit"
    ) -> tuple[int, str]:
        data = {
            "class_path": "tessellar.data.ImageFolderData",
            "init_args": {"root": "d", "size": 16, "batch_size": 8},
        }
        config = {"trainer": TRAINER, "log_every": 1, "model": model, "data": data}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        caplog.clear()
        arguments = [
            "--config",
            "run.yaml",
            "--name",
            name,
            "--trainer.max_steps",
            str(steps),
            *options,
        ]
        code = run(lambda: train.main([action, *arguments]))
        warned = [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("tessellar") and record.levelno >= logging.WARNING
        ]
        return code, capsys.readouterr().err + "".join(f"{line}\n" for line in warned)

    return command


def written(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_classes_that_changed_are_refused_and_content_that_changed_is_said(call) -> None:
    assert call(TOKENIZER, "tok", 2)[0] == 0
    assert call(GENERATOR, "gen", 2)[0] == 0
    for name in ("tok", "gen"):
        facts = facts_in(torch.load(f"runs/{name}/{LAST}", weights_only=True), name)
        assert facts is not None and facts.class_names == CLASSES and facts.name == "d"
        assert json.loads(Path(f"runs/{name}/run.json").read_text())["data"] == facts.as_dict()

    before = written("runs")
    Path("d/circle").rename("d/zebra")
    said = "was trained on other classes: class 0 was 'circle' and is now 'square'; continue it with the data of d"
    for name, model in (("tok", TOKENIZER), ("gen", GENERATOR)):
        code, printed = call(model, name, 4, "--resume", "auto")
        assert (
            code == 2
            and printed.startswith(f"error: runs/{name}/{LAST} {said}")
            and printed.count("\n") == 1
        )
    code, printed = call(GENERATOR, "new", 4, "--resume", f"runs/gen/{LAST}")
    assert code == 2 and said in printed and not Path("runs/new").exists()
    assert written("runs") == before

    code, printed = call(GENERATOR, "gen", 2, "--resume", "auto", action="validate")
    assert code == 2 and said in printed
    code, printed = call(
        TOKENIZER, "tok", 2, "--resume", "auto", action="validate"
    )  # reads no label
    assert (
        code == 0
        and printed.count("was trained on other classes") == 1
        and printed.count("\n") == 1
    )

    Path("d/zebra").rename("d/circle")
    picture(Path("d/oval/0.png"))
    code, printed = call(TOKENIZER, "tok", 4, "--resume", "auto")
    assert code == 2 and "class 1 was 'square' and is now 'oval' (3 classes then, 4 now)" in printed
    Path("d/oval/0.png").unlink()
    Path("d/oval").rmdir()

    assert call(GENERATOR, "gen", 4, "--resume", "auto") == (0, "")  # as it was: nothing is said
    picture(Path("d/circle/0.png"), size=30)
    code, printed = call(GENERATOR, "gen", 6, "--resume", "auto")
    assert code == 0 and printed.count("\n") == 1
    assert "data is not what it was trained on (d)" in printed


def test_an_old_checkpoint_goes_on_unchecked_and_says_so(call, tmp_path: Path) -> None:
    assert call(TOKENIZER, "tok", 2)[0] == 0
    path = Path(f"runs/tok/{LAST}")
    content = torch.load(path, weights_only=True)
    kept = content.pop(DATA_KEY)
    torch.save(content, path)
    Path("d/circle").rename("d/zebra")
    code, printed = call(TOKENIZER, "tok", 4, "--resume", "auto")
    line = (
        f"runs/tok/{LAST} does not say what it was trained on: classes and data are not compared\n"
    )
    assert (code, printed) == (0, line)
    assert torch.load(path, weights_only=True)[DATA_KEY]["class_names"] == [
        "square",
        "triangle",
        "zebra",
    ]
    torch.save({**content, DATA_KEY: {**kept, "class_names": 5}}, path)
    code, printed = call(TOKENIZER, "tok", 6, "--resume", "auto")
    assert code == 2 and "what it says of its data (training_data) cannot be read" in printed


def test_fine_tuning_on_other_classes_says_so(call) -> None:
    assert call(TOKENIZER, "tok", 1)[0] == 0
    assert call(GENERATOR, "gen", 1)[0] == 0
    Path("d/circle").rename("d/zebra")
    source = f"runs/gen/{LAST}"
    code, printed = call(GENERATOR, "fine", 1, "--model.init_from", source)
    assert code == 0
    assert (
        f"{source} was trained on other classes: class 0 was 'circle' and is now 'square'; "
        in printed
    )
