"""docs/your_own_images.md: its commands are run, in its order, on generated pictures, at a tiny size."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import tessellar
from tessellar import data
from tessellar.cli import convert, sample, train
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.output import save_png

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your_own_images.md").read_text()
MAIN = {"train": train.main, "convert": convert.main, "sample": sample.main}
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_pictures(tmp_path / "pictures")
    steps = commands()
    assert [words[1] for words in steps] == ["train.py", "convert.py", "train.py", "sample.py"]
    for python, script, *arguments in steps:
        assert python == "python" and (ROOT / script).is_file()
        command = script.removesuffix(".py")
        assert not MAIN[command](smaller(command, arguments))
    assert isinstance(tessellar.load("runs/pictures-generator/export"), ImageGenerator)
    header = data.CachedTokens("caches/pictures/train").header
    assert (header.count, header.views, header.class_names) == (
        22,
        2,
        ("circle", "square", "triangle"),
    )
    made = sorted(path.name for path in (tmp_path / "outputs/pictures").glob("*_*.png"))
    assert made == ["000000_0000.png", "000001_0001.png", "000002_0002.png"]
    with Image.open("outputs/pictures/grid.png") as grid:
        assert grid.width >= 64 and grid.height >= 3 * 64
    assert {path.name for path in tmp_path.iterdir()} == {
        "configs",
        "pictures",
        "runs",
        "caches",
        "outputs",
    }


def test_every_class_and_file_that_the_page_names_exists():
    for name in re.findall(r"`tessellar\.data\.(\w+)`", PAGE):
        assert isinstance(getattr(data, name), type)
    for path in re.findall(r"(?:configs|tests|benchmarks)/[\w/]+\.(?:yaml|py)", PAGE):
        assert (ROOT / path).is_file(), path
