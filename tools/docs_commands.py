"""The first hour of a new user, as a check: README and docs/your_own_images.md followed to the letter, then what
people do instead of what the pages say.

    python tools/docs_commands.py [--quick] [--folder outputs/first_hour] [--write]

Every step is a process of its own, as a user starts it, in a folder with generated photographs in eight class folders
(JPEG, PNG with transparency, grey, WebP; files of other kinds beside them). A step says what it expects: the exit
code, words of its output, files. `--quick` takes a few updates in place of each run's own number, for minutes instead
of an hour. `--write` puts the screens of some steps into the pages (between `<!-- screen: NAME -->` and its end).
Exit code 1 where anything is not as expected.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"readme": ROOT / "README.md", "own": ROOT / "docs/your_own_images.md"}
LINKED = ("configs", "demo", "train.py", "sample.py", "evaluate.py", "convert.py")
CLASSES = ("beach", "city", "desert", "forest", "lake", "meadow", "mountain", "snow")
PER_CLASS = 30
SIZE = 64
QUICK = {
    "train.py": [
        "--trainer.max_steps=24",
        "--trainer.val_check_interval=12",
        "--trainer.accelerator=cpu",
    ],
    "sample.py": ["--per-class", "2"],
    "model": ["--count", "40"],
    "extractor": ["--recipe.epochs", "1", "--architecture.arch", "test_resnet"],
    "neighbours": ["--count", "3"],
}


@dataclass
class Step:
    """One command of a user and what it should do.

    `says` are regular expressions of lines, `never` such that must not appear, `makes` files that are there afterwards.
    `interrupt` sends Ctrl-C when its expression has appeared. `screen` names the text that pages show.
    """

    title: str
    words: list[str]
    code: int = 0
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ("Traceback",)
    makes: tuple[str, ...] = ()
    interrupt: str = ""
    screen: str = ""
    before: Callable[[], None] | None = None


@dataclass
class Outcome:
    """What came of a step."""

    step: Step
    output: str
    seconds: float
    wrong: list[str] = field(default_factory=list)


def photographs(root: Path) -> None:
    """Generated photographs: a sky, a ground and some things in the colours of the class, of many sizes and kinds."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        hues = np.random.default_rng(number).integers(40, 220, (3, 3))
        for i in range(PER_CLASS):
            height, width = (int(side) for side in draw.integers(70, 140, 2))
            pixels = scene(hues, height, width, draw)
            save(Image.fromarray(pixels), folder, i)
    (root / CLASSES[0] / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / CLASSES[1] / "notes.txt").write_text("where these were taken\n")
    (root / CLASSES[2] / "._0.png").write_bytes(b"\0\5\26\7")


def scene(hues: np.ndarray, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3]."""
    horizon = int(height * draw.uniform(0.35, 0.65))
    rows = np.arange(height)[:, None, None]
    ground = rows >= horizon
    pixels = np.where(ground, hues[1], hues[0]) * np.ones((height, width, 1))
    pixels = pixels * (0.8 + 0.4 * rows / height)
    y, x = np.mgrid[:height, :width]
    for _ in range(int(draw.integers(2, 6))):
        at_y, at_x = draw.uniform(0, height), draw.uniform(0, width)
        inside = ((y - at_y) / 9) ** 2 + ((x - at_x) / 14) ** 2 < draw.uniform(0.5, 2)
        pixels[inside] = hues[2]
    return np.clip(pixels + draw.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def save(picture: Image.Image, folder: Path, i: int) -> None:
    """JPEG mostly; some PNG with transparency, some grey, some WebP."""
    match i % 6:
        case 0:
            picture.convert("RGBA").save(folder / f"{i}.png")
        case 1:
            picture.convert("L").save(folder / f"{i}.jpg")
        case 2:
            picture.save(folder / f"{i}.webp")
        case _:
            picture.save(folder / f"{i}.JPG", format="JPEG")


def of_page(page: Path) -> list[list[str]]:
    """The commands in the blocks of a page that are marked as executed."""
    blocks = re.findall(r"<!-- executed.*?-->\s*```bash\n(.*?)```", page.read_text(), flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def quicker(words: list[str]) -> list[str]:
    """The same command with a few updates or images."""
    script, *rest = words
    key = script if script in QUICK else rest[0] if rest else ""
    return [*words, *QUICK.get(key, [])]


def steps(quick: bool) -> list[Step]:
    """The whole hour."""
    followed = []
    for name, page in PAGES.items():
        for python, *words in of_page(page):
            assert python == "python", words
            words = quicker(words) if quick else words
            if "pictures-generator" in words and "--model.generator.num_classes" in words:
                words = [re.sub(r"^3$", str(len(CLASSES)), word) for word in words]
            if name == "own" and words[0] == "sample.py" and "circle" in " ".join(words):
                continue
            followed.append(Step(f"{name}: {' '.join(words[:3])}", words))
    for step in followed:
        expect(step)
    return followed + departures()


def expect(step: Step) -> None:
    """What the commands of the pages should leave and say."""
    words = step.words
    if words[0] == "train.py":
        run = f"runs/{words[words.index('--name') + 1]}"
        step.makes = (f"{run}/export/model.safetensors", f"{run}/report.html", f"{run}/metrics.csv")
        step.says = ("tokens an image", "export: ")
    if words[0] == "sample.py":
        out = words[words.index("--out") + 1]
        step.makes = (f"{out}/grid.png", f"{out}/samples.json")
        step.says = (r"\d+ images in ",)
    if words[:2] == ["evaluate.py", "model"]:
        step.says = (r"FD\(", "record: ")
    if words[:2] == ["convert.py", "cache"]:
        step.makes = ("caches/pictures/train/header.json", "caches/pictures/val/header.json")
        step.says = (r"train: \d+ images", "wrote caches/pictures")
    if "--out" in words and "pictures" in words[words.index("--out") + 1]:
        step.screen = words[1] if words[0] == "evaluate.py" else words[0].removesuffix(".py")


TOKENIZER = ["train.py", "--config", "configs/own_images/tokenizer.yaml", "--data.root", "pictures"]
FEW = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "6", "--trainer.accelerator=cpu"]
GENERATOR = ["train.py", "--config", "configs/own_images/generator.yaml"]
EXPORT = "runs/pictures-generator/export"


def departures() -> list[Step]:
    """What people do besides, and what should answer them: one line, or the thing itself."""
    one_line = ("Traceback", r"error:.*\n.*error:")
    more = FEW[2:]
    finished = json_updates("runs/pictures-tokenizer/run.json")
    return [
        Step("train.py alone", ["train.py"], code=2, says=("--config",), never=one_line),
        Step("a config without --config", ["train.py", TOKENIZER[2]], code=2, says=("--config",)),
        Step(
            "a name that is taken",
            [*TOKENIZER, "--name", "pictures-tokenizer", *FEW],
            code=2,
            says=("exists; choose another --name",),
            never=one_line,
        ),
        Step(
            "another number of classes",
            [*GENERATOR, "--name", "wrong", *FEW, "--model.generator.num_classes", "3"],
            code=2,
            says=(f"has 3 classes; .* has {len(CLASSES)}",),
            never=one_line,
        ),
        Step(
            "Ctrl-C while training",
            [*TOKENIZER, "--name", "stopped", "--log_every", "1", "--trainer.max_steps", "100000"],
            code=130,
            interrupt=r"step|update|it/s|epoch",
            makes=("runs/stopped/checkpoints/last.ckpt",),
        ),
        Step(
            "it goes on",
            [
                *TOKENIZER,
                "--name",
                "stopped",
                "--resume",
                "auto",
                *more,
                "--trainer.max_steps",
                "100001",
                "--trainer.max_time",
                "00:00:00:20",
            ],
            says=("goes on after update",),
        ),
        Step(
            "a finished run goes on",
            [
                "train.py",
                "--config",
                TOKENIZER[2],
                "--data.root",
                "pictures",
                "--name",
                "pictures-tokenizer",
                "--resume",
                "auto",
                *more,
                "--trainer.max_steps",
                str(finished + 4),
            ],
            says=(f"goes on after update {finished}", "export: "),
        ),
        Step(
            "samples by name",
            [
                "sample.py",
                EXPORT,
                "--out",
                "outputs/named",
                "--classes",
                "snow,beach",
                "--per-class",
                "2",
            ],
            makes=("outputs/named/000000_0007_snow.png",),
            screen="named",
        ),
        Step(
            "a class that is misspelt",
            ["sample.py", EXPORT, "--out", "outputs/x", "--classes", "snwo"],
            code=2,
            says=("did you mean 'snow'",),
            never=one_line,
        ),
        Step(
            "which classes are there",
            ["convert.py", "info", EXPORT],
            says=("0 beach, 1 city",),
            screen="info",
        ),
        Step(
            "fine-tuning on other classes",
            [
                *GENERATOR,
                "--name",
                "two",
                *FEW,
                "--model.init_from",
                EXPORT,
                "--model.generator.num_classes",
                "3",
                "--data",
                "tessellar.data.ImageFolderData",
                "--data.root",
                "others",
                "--data.size",
                str(SIZE),
                "--data.batch_size",
                "8",
            ],
            before=other_pictures,
            says=("2 known by name .'beach', 'snow'.. 1 new .'volcano'.",),
            makes=("runs/two/export/config.yaml",),
        ),
        Step(
            "folders of several sizes",
            [
                "evaluate.py",
                "samples",
                "others",
                "--reference",
                "pictures",
                "--extractor",
                "demo/shapes_classifier.safetensors",
                "--metrics",
                "fd",
            ],
            code=2,
            says=("lossy|compressed with loss|--size N",),
            never=one_line,
        ),
        Step(
            "reports side by side",
            [
                "-c",
                TESSELLAR,
                "report",
                "runs/two",
                "runs/pictures-generator",
                "--out",
                "outputs/two.html",
            ],
            makes=("outputs/two.html",),
        ),
        Step(
            "the pages' Python under a type checker",
            ["-m", "pyright", "-p", "typed"],
            before=typed_lines,
            says=("0 errors",),
        ),
        Step("from Python", ["-c", LIBRARY], says=("2 pictures of 64 x 64",), screen="library"),
    ]


TESSELLAR = "from tessellar.cli.main import main; main()"  # what the installed command does
LIBRARY = f"""
import tessellar
generator = tessellar.load_generator("{EXPORT}")
images = generator.sample(classes=["snow", 0], guidance=1.5, seed=0)
print(len(images), "pictures of", "%d x %d" % images[0].size)
print(generator.encode(images).shape)
"""


def typed_lines() -> None:
    """The Python of README and docs/library.md as files for a type checker."""
    folder = Path("typed")
    folder.mkdir(exist_ok=True)
    for page in (ROOT / "README.md", ROOT / "docs/library.md"):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
        (folder / f"{page.stem.lower()}_lines.py").write_text("\n".join(blocks))
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "reportMissingModuleSource": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))


def json_updates(path: str) -> int:
    """Updates that a run has made; 0 where it has not been run."""
    try:
        return int(json.loads(Path(path).read_text())["updates"])
    except (OSError, ValueError, KeyError):
        return 0


def other_pictures() -> None:
    """Three folders: two of the classes that the model knows, one new."""
    for name in ("beach", "snow"):
        shutil.copytree(Path("pictures") / name, Path("others") / name)
    shutil.copytree("pictures/city", "others/volcano")


def run(step: Step, environment: dict[str, str]) -> Outcome:
    """Run a step and compare."""
    if step.before is not None:
        step.before()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *step.words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if step.interrupt and re.search(step.interrupt, line) and "interrupted" not in line:
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            step.interrupt = ""
    code = process.wait()
    output = "".join(lines)
    outcome = Outcome(step, output, time.perf_counter() - start)
    if code != step.code:
        outcome.wrong.append(f"exit code {code}, not {step.code}")
    for wanted in step.says:
        if not re.search(wanted, output):
            outcome.wrong.append(f"does not say {wanted!r}")
    for unwanted in step.never:
        if re.search(unwanted, output):
            outcome.wrong.append(f"says {unwanted!r}")
    outcome.wrong += [f"{path} is not there" for path in step.makes if not Path(path).exists()]
    return outcome


def shown(outcome: Outcome) -> str:
    """A command with its output as pages show it, without colours and what a bar wrote over."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.output)
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]
    words = outcome.step.words
    command = "python " + shlex.join(words)
    if words[0] == "-c":
        command = f"tessellar {shlex.join(words[2:])}" if len(words) > 2 else words[1].strip()
    return "\n".join([f"$ {command}", *filter(None, lines)])


def write_screens(outcomes: list[Outcome]) -> list[Path]:
    """Put the screens into the pages that ask for them; returns the pages that changed."""
    screens = {outcome.step.screen: shown(outcome) for outcome in outcomes if outcome.step.screen}
    changed = []
    for page in sorted({*PAGES.values(), *(ROOT / "docs").glob("*.md")}):
        old = page.read_text()
        new = old
        for name, screen in screens.items():
            block = f"<!-- screen: {name} -->\n```text\n{screen}\n```\n<!-- end of screen -->"
            pattern = rf"<!-- screen: {re.escape(name)} -->.*?<!-- end of screen -->"
            new = re.sub(pattern, lambda _, block=block: block, new, flags=re.S)
        if new != old:
            page.write_text(new)
            changed.append(page)
    return changed


def main() -> int:
    """Run all steps; returns the exit code."""
    parser = argparse.ArgumentParser(description="the first hour as a check")
    parser.add_argument("--folder", default="outputs/first_hour")
    parser.add_argument("--quick", action="store_true", help="a few updates in place of whole runs")
    parser.add_argument("--write", action="store_true", help="put screens into the pages")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    photographs(folder / "pictures")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    outcomes = []
    planned = steps(options.quick)
    while len(outcomes) < len(planned):
        step = planned[len(outcomes)]
        outcome = run(step, environment)
        outcomes.append(outcome)
        verdict = "ok" if not outcome.wrong else "; ".join(outcome.wrong)
        print(f"{outcome.seconds:6.1f} s  {step.title}: {verdict}", flush=True)
        if outcome.wrong:
            print("    " + "\n    ".join(outcome.output.splitlines()[-12:]), flush=True)
        if len(outcomes) == len(planned) - len(departures()):
            planned = [*planned[: len(outcomes)], *departures()]  # which look at what was made
    log = "\n\n".join(shown(outcome) for outcome in outcomes)
    (folder / "screens.txt").write_text(log + "\n")
    if options.write:
        print("written:", *write_screens(outcomes))
    failed = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(outcomes)} steps, {failed} not as expected; screens: {folder / 'screens.txt'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
