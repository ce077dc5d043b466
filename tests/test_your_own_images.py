"""docs/your_own_images.md: its commands are run, in its order, on generated pictures, at a tiny size."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import tessellar
from tessellar import data
from tessellar.cli import convert, evaluate, sample, train
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.output import save_png

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your_own_images.md").read_text()
MAIN = {
    "train": train.main,
    "convert": convert.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
}
SMALL_EVALUATION = {
    "extractor": [
        "--data.batch_size",
        "4",
        "--recipe.epochs",
        "1",
        "--architecture.arch",
        "test_resnet",
    ],
    "model": ["--count", "6"],
    "neighbours": ["--count", "2", "--nearest", "2"],
}
SMALL_RUN = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"]
SMALL_RUN += ["--trainer.precision=32-true", "--data.batch_size=4"]
SMALL_TOKENIZER = [
    "--model.tokenizer.width=16",
    "--model.tokenizer.decoder_depth=1",
    "--model.tokenizer.num_heads=2",
]
SMALL_GENERATOR = ["--model.generator.width=48", "--model.generator.depth=1"]


def commands() -> list[list[str]]:
    blocks = re.findall(r"<!-- executed -->\n```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def smaller(command: str, arguments: list[str]) -> list[str]:
    """The page's arguments, and options that make the command quick."""
    match command:
        case "train":
            size = SMALL_TOKENIZER if "tokenizer" in arguments[1] else SMALL_GENERATOR
            return [*arguments, *SMALL_RUN, *size]
        case "sample":
            return [*arguments, "--per-class", "1", "--device", "cpu"]
        case "evaluate":
            return [*arguments, *SMALL_EVALUATION[arguments[0]], "--device", "cpu"]
    return [*arguments, "--device", "cpu"]


def write_pictures(root: Path) -> None:
    """Eight pictures of each of the page's three classes."""
    shapes = data.Shapes(80, 80)
    for shown in (shapes[i] for i in range(80)):
        folder = root / shapes.class_names[shown["label"]]
        if folder.name in ("circle", "square", "triangle"):
            folder.mkdir(parents=True, exist_ok=True)
            save_png(to_uint8(shown["image"]), folder / f"{shown['index']}.png")


def test_the_commands_lead_from_pictures_to_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_pictures(tmp_path / "pictures")
    steps = commands()
    scripts = ["train.py", "convert.py", "train.py", "sample.py", *["evaluate.py"] * 3]
    assert [words[1] for words in steps] == scripts
    for python, script, *arguments in steps:
        assert python == "python" and (ROOT / script).is_file()
        command = script.removesuffix(".py")
        assert not MAIN[command](smaller(command, arguments))
    generator = tessellar.load("runs/pictures-generator/export")
    assert isinstance(generator, ImageGenerator)
    assert generator.class_names == ("circle", "square", "triangle")
    last = tessellar.load("runs/pictures-generator/checkpoints/last.ckpt")
    assert isinstance(last, ImageGenerator) and last.class_names == generator.class_names
    assert "| 1 | square |" in Path("runs/pictures-generator/export/README.md").read_text()
    convert.main(["info", "runs/pictures-generator/export"])
    assert "3: 0 circle, 1 square, 2 triangle" in capsys.readouterr().out
    sample.main(["runs/pictures-generator/export", "--out", "named", "--classes", "square"])
    record = json.loads(Path("named/samples.json").read_text())
    assert record["classes"] == [1] and record["class_names"][1] == "square"
    assert Path("named/000000_0001_square.png").is_file()
    for run in ("pictures-tokenizer", "pictures-generator"):
        assert "<svg" in Path(f"runs/{run}/report.html").read_text()
    header = data.CachedTokens("caches/pictures/train").header
    assert (header.count, header.views, header.class_names) == (
        22,
        2,
        ("circle", "square", "triangle"),
    )
    made = sorted(path.name for path in (tmp_path / "outputs/pictures").glob("*_*.png"))
    assert made == ["000000_0000_circle.png", "000001_0001_square.png", "000002_0002_triangle.png"]
    (measured,) = Path("outputs/evaluations").glob("*.json")
    assert set(json.loads(measured.read_text())["metrics"]) == {
        "FD(pictures-test_resnet)",
        "accuracy",
    }
    with Image.open("outputs/pictures/grid.png") as grid:
        assert grid.width >= 64 and grid.height >= 3 * 64
    assert {path.name for path in tmp_path.iterdir()} == {
        "configs",
        "pictures",
        "runs",
        "caches",
        "outputs",
        "named",
    }


def test_every_class_and_file_that_the_page_names_exists():
    for name in re.findall(r"`tessellar\.data\.(\w+)`", PAGE):
        assert isinstance(getattr(data, name), type)
    for path in re.findall(r"(?:configs|tests|benchmarks)/[\w/]+\.(?:yaml|py)", PAGE):
        assert (ROOT / path).is_file(), path
