"""The first hour of a new user, as a check: the commands of README and of the pages followed in their order, then what
people do instead of what the pages say.

    python tools/docs_commands.py [--page own evaluation] [--whole] [--folder outputs/first_hour] [--write]

In a folder with generated photographs, Fashion-MNIST files and tars, every command in a `bash` block of a page is run
as it is written, with a few updates and images in place of the page's own numbers (`--whole`: the page's own). What
cannot be run here is named in LEFT_OUT with its reason. A step says what it expects: the exit code, words of its
output, files. `--write` puts screens into the pages (between `<!-- screen: NAME -->` and its end). Exit code 1 where
anything is not as expected; the last lines name the pages.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["COLUMNS"] = "100"

from hour.generated import CLASSES, clip_art, fashion, photographs  # noqa: E402
from hour.steps import Outcome, Step, run, shown  # noqa: E402

LINKED = ("configs", "demo", "tests", "benchmarks", "train.py", "sample.py", "evaluate.py")
LINKED += ("convert.py",)
IMPORTED = ("train", "sample", "evaluate", "convert", "cache", "report", "data")
TESSELLAR = "from tessellar.cli.main import main; main()"  # what the installed command does
EXPORT = "runs/pictures-generator/export"

#: Commands that are not run here, and why.
LEFT_OUT = {
    r"^(python3 -m venv|pip|make|uv)\b": "installs, or runs this",
    r"^bash tools/browser\.sh": "installs, then runs tests/page/test_browser.py",
    r"^(bash tools/docker\.sh|docker)\b": "needs Docker's daemon: .github/workflows",
    r"^(torchrun|srun|if|export)\b|--trainer\.devices 2": "processes and clusters: tests/training",
    r"^tessellar (serve|demo) \w+/": "does not end: tests/serving, tests/page",
    r"VIRTUAL_imagenet256|dinov2_vits14\.safetensors": "published files",
    r"convert\.py import ": "published weights: tests/interop",
    r"benchmarks/gpu\.sh": "needs a GPU; tests/test_gpu_script.py runs it at toy sizes",
    r"benchmarks/speedrun\.py": "a quarter of an hour to hours; tests/test_speedrun.py tries it",
    r"benchmarks/all_costs\.sh": "ten minutes of an idle machine; tests/test_cost_benchmarks.py",
    r"-m benchmarks\.studies\.": "hours; their results are committed",
    r"mypackage|mypaper": "a package of others: tests/interop/test_strangers_paper.py",
}


@dataclass(frozen=True)
class Page:
    """A page that is followed: its file, what must be there before, and what its placeholders are here."""

    name: str
    file: str
    before: tuple[Callable[[], list[Step]], ...] = ()
    placeholders: tuple[tuple[str, str], ...] = ()
    made: Callable[[], str] | None = (
        None  # text of pages that lie nowhere, but are made for the site
    )

    @property
    def path(self) -> Path:
        return ROOT / self.file

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.made is None else self.made()


def papers_pages() -> str:
    """The pages of all papers."""
    from docs_site.pages import page_of
    from docs_site.papers import papers

    return "\n".join(page_of(paper, drawn=False) for paper in papers())


def pages() -> list[Page]:
    """All pages with commands, in the order of a reader."""
    data = (("DIR", "data/fashion"), ("NET", "data/net.safetensors"))
    clips = (("DIR", "data/clips"),)
    own = (("num_classes 3", f"num_classes {len(CLASSES)}"),)
    return [
        Page("readme", "README.md", (fashion_files,), data),
        Page("install", "docs/install.md"),
        Page("own", "docs/your_own_images.md", (), own),
        Page("training", "docs/training.md"),
        Page("library", "docs/library.md", (shapes,)),
        Page("evaluation", "docs/evaluation.md", (demo, records, fashion_files), data),
        Page("checkpoints", "docs/checkpoints.md", (mine_and_more,)),
        Page("environment", "docs/environment.md"),
        Page("cost", "docs/cost.md"),
        Page("decoding", "docs/decoding.md", (demo,)),
        Page("alignment", "docs/alignment.md", (fashion_files,), data),
        Page("joint", "docs/joint.md", (fashion_files,), data),
        Page("search", "docs/search.md", (demo,)),
        Page("editing", "docs/editing.md", (demo,)),
        Page("page", "docs/page.md"),
        Page("serving", "docs/serving.md"),
        Page("generators", "docs/generators.md", (fashion_files, kl_f4), data),
        Page("tokenizers", "docs/tokenizers.md", (fashion_files,), data),
        Page("small", "docs/small_recipes.md", (fashion_files,), data),
        Page("text", "docs/text_to_image.md", (clip_art_files,), clips),
        Page("imagenet", "docs/recipes/imagenet256.md"),
        Page("zoo", "docs/zoo.md"),
        Page("speedrun", "docs/speedrun.md"),
        Page("papers", "papers/*.md", made=papers_pages),
    ]


#: Pages whose first block of Python is run; all are looked at by a type checker.
RUN_PYTHON = ("readme", "library", "decoding")
FEW = ["--trainer.max_steps", "8", "--trainer.val_check_interval", "4", "--log_every", "1"]
SMALL = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.batch_size", "8"]
FEW_SHAPES = ["--data.length", "64", "--data.val_length", "16"]
FEW_OF = {
    "extractor": [
        "--recipe.epochs",
        "1",
        "--architecture.arch",
        "test_resnet",
        "--data.batch_size",
        "32",
    ],
    "model": ["--count", "12", "--precision", "float32"],
    "sweep": ["--count", "12"],
    "tokens": ["--count", "12"],
    "probe": ["--count", "12", "--train_count", "24"],
    "stats": ["--count", "12"],
    "neighbours": ["--count", "3"],
    "benchmarks/reconstruction.py": ["--images", "16", "--few", "8"],
}


def smaller(words: list[str]) -> list[str]:
    """The same command with a few updates or images."""
    script = words[0]
    if "--protocol" in words:  # which fixes the number of images
        place = words.index("--protocol")
        words = [*words[:place], *words[place + 2 :]]
    shapes_data = any("demo/" in word and word.endswith(".yaml") for word in words)
    shapes_data |= any(word.endswith("ShapesData") for word in words)
    few_shapes = FEW_SHAPES if shapes_data else []
    if script == "train.py":
        if "--print_config" in words:
            return words
        few = ["--trainer.max_steps", "12", *FEW[2:]] if "--resume" in words else FEW
        quick = ["--sampling.flow.steps", "2"] if "xar" in " ".join(words) else []
        return [*words, *few, *SMALL, *few_shapes, *quick]
    if script == "sample.py":
        return [*words, "--per-class", "2"] if "--per-class" in words else [*words, "--count", "4"]
    if words[2:3] == ["sweep"]:  # `tessellar sweep`
        return [*words, "--updates", "4", "--trainer.limit_val_batches", "1", *few_shapes]
    chosen = words[1] if script == "evaluate.py" else script
    few = FEW_OF.get(chosen, [])
    if chosen == "stats" and "train" not in words:
        few = ["--extractor", "demo/shapes_classifier.safetensors", "--size", "24"]
    return [*words, *few, *few_shapes]


def commands_of(page: Page) -> list[str]:
    """The commands in the `bash` blocks of a page, each once."""
    blocks = re.findall(r"```bash\n(.*?)```", page.text, flags=re.S)
    return list(dict.fromkeys(lines_of("\n".join(blocks))))


def lines_of(block: str) -> list[str]:
    """The commands of a block, a line each."""
    text = re.sub(r"\\\n\s*", "", block)
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def with_reasons(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Commands, each with why it is not run here; "" where it is run."""
    reasons = dict(LEFT_OUT)
    found = []
    for line in lines:
        reason = next((why for left, why in reasons.items() if re.search(left, line)), "")
        found.append((line, reason))
        if reason:  # what it would have made is not there for later ones
            for made in re.findall(r"--out ((?:exports|runs)/\S+)", line):
                reasons[re.escape(made)] = reason
    return found


def counted() -> str:
    """How many commands stand on the pages, and how many of them are run."""
    found = [item for page in pages() for item in with_reasons(commands_of(page))]
    left = sum(bool(reason) for _, reason in found)
    return (
        f"{len(found)} commands on the pages: {len(found) - left} run at tiny size, "
        f"{left} marked as not run here"
    )


def with_count(page: str) -> str:
    """A page whose place for it holds the count of all commands: on the site it is that of the build."""
    return re.sub(
        r"(<!-- commands -->).*?(<!-- end of commands -->)",
        rf"\g<1>{counted()}\g<2>",
        page,
        flags=re.S,
    )


def python_of(file: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.S)


def steps_of(page: Page, whole: bool) -> list[Step]:
    """What a page says, as steps."""
    found = []
    for line, reason in with_reasons(commands_of(page)):
        if reason:
            continue
        for placeholder, here in page.placeholders:
            line = re.sub(rf"(?<![A-Z_]){placeholder}(?![A-Z_\d])", here, line)
        script, *rest = shlex.split(line, comments=True)
        words = rest if script == "python" else ["-c", TESSELLAR, *rest]
        assert script in ("python", "tessellar"), line
        step = Step(" ".join(shlex.split(line)[:4]), words if whole else smaller(words))
        expect(step, page)
        found.append(step)
    if page.name in RUN_PYTHON:
        found.append(Step("its Python", ["-c", python_of(page.path)[0]]))
    return found


def expect(step: Step, page: Page) -> None:
    """What the commands of the pages should leave and say."""
    words = step.words
    if words[0] == "train.py" and not {"validate", "--print_config", "--dry_run"} & set(words):
        run_folder = f"runs/{words[words.index('--name') + 1]}"
        files = ("export/model.safetensors", "report.html", "metrics.csv", "log.txt")
        step.makes = tuple(f"{run_folder}/{file}" for file in files)
        step.says = ("tokens an image", "writes runs/", "export: ", "next: ")
    if words[0] == "sample.py":
        out = words[words.index("--out") + 1] if "--out" in words else "outputs/samples"
        step.makes = (f"{out}/grid.png", f"{out}/samples.json")
        step.says = (r"\d+ images in ", f"writes {out}")
        part, _, parts = (
            words[words.index("--shard") + 1].partition("/") if "--shard" in words else ("", "", "")
        )
        if part != parts:  # the folder appears with the last part
            step.makes = ()
            step.says = (r"\d+ of \d+ images are in ", f"writes {out}")
    if words[:2] == ["evaluate.py", "model"]:
        step.says = (r"FD\(", "record: ", "writes ")
    if words[:2] == ["convert.py", "cache"]:
        out = words[words.index("--out") + 1]
        step.makes = (f"{out}/train/header.json", f"{out}/val/header.json")
        step.says = (r"train: \d+ images", "wrote caches/", "next: ")
    if page.name == "own" and words[0] == "train.py":
        step.says += ("8 classes",)
    if page.name == "own":
        step.screen = words[1] if words[0] == "evaluate.py" else words[0].removesuffix(".py")
        if words[0] == "train.py":
            step.screen = words[words.index("--name") + 1]
    if step.screen == "pictures-tokenizer":
        step.says += (r"files are not read \(\.heic 1, \.txt 1\)",)


# What pages take for granted.


def fashion_files() -> list[Step]:
    """Fashion-MNIST's files and a network trained on them."""
    if Path("data/fashion").exists():
        return []
    words = ["evaluate.py", "extractor", "--data", "tessellar.data.FashionMNISTData"]
    words += ["--data.root", "data/fashion", "--out", "data/net.safetensors"]
    return [
        Step(
            "a network of Fashion-MNIST",
            smaller(words),
            before=lambda: fashion(Path("data/fashion")),
        )
    ]


def clip_art_files() -> list[Step]:
    """Tars with captions."""
    if not Path("data/clips").exists():
        clip_art(Path("data/clips"))
    return []


def shapes() -> list[Step]:
    """The runs of README, where its page has not been followed."""
    if Path("runs/shapes-generator/export").exists():
        return []
    return [*_demo_run("tokenizer", "shapes"), *_demo_run("generator", "shapes")]


def demo() -> list[Step]:
    """What `make demo` leaves, smaller."""
    if Path("outputs/demo").exists():
        return []
    words = ["sample.py", "runs/demo-generator/export", "--out", "outputs/demo", "--per-class", "2"]
    runs = [*_demo_run("tokenizer", "demo"), *_demo_run("generator", "demo")]
    return [*runs, Step("the demo's samples", words)]


def _demo_run(part: str, name: str) -> list[Step]:
    words = ["train.py", "--config", f"configs/demo/{part}.yaml", "--name", f"{name}-{part}"]
    if part == "generator":
        words += ["--model.tokenizer", f"runs/{name}-tokenizer/export"]
    return [Step(f"{name}: a {part}", smaller(words))]


def records() -> list[Step]:
    """Two records that are compared, and a folder of pictures."""
    if Path("folder").exists():
        return []
    words = ["evaluate.py", "model", "runs/demo-tokenizer/export", *FEW_OF["model"]]
    words += ["--extractor", "demo/shapes_classifier.safetensors", "--out"]
    shutil.copytree("pictures/lake", "folder")
    return [Step(f"a record {name}", [*words, f"{name}.json"]) for name in "ab"]


def kl_f4() -> list[Step]:
    """The tokenizer whose latents xAR draws."""
    words = ["train.py", "--config", "configs/fashion_mnist/kl_f4.yaml", "--name", "kl_f4"]
    return [Step("a continuous tokenizer", smaller([*words, "--data.root", "data/fashion"]))]


def mine_and_more() -> list[Step]:
    """A run called mine; pictures of five classes, three of them new, as a cache."""
    if not Path("runs/pictures-generator").exists():
        raise SystemExit(
            "the page of checkpoints needs that of own pictures: --page own checkpoints"
        )
    shutil.copytree("runs/pictures-generator", "runs/mine")
    for name in ("beach", "snow"):
        shutil.copytree(Path("pictures") / name, Path("more") / name)
    for name in ("a", "b", "c"):
        shutil.copytree("pictures/city", Path("more") / name)
    words = ["convert.py", "cache", "runs/pictures-tokenizer/export", "--out", "caches/more"]
    words += [
        "--data",
        "tessellar.data.ImageFolderData",
        "--data.root",
        "more",
        "--data.size",
        "64",
    ]
    return [Step("a cache of other classes", words)]


def updates_of(path: str) -> int:
    """Updates that a run has made; 0 where it has not been run."""
    try:
        return int(json.loads(Path(path).read_text())["updates"])
    except (OSError, ValueError, KeyError):
        return 0


# What people do besides.


def pasted() -> list[Step]:
    """The commands that the runs of own pictures name at their end, as they stand there."""
    found = []
    for name in ("pictures-tokenizer", "pictures-generator"):
        log = Path(f"runs/{name}/log.txt").read_text()
        for line in re.findall(r"(?:next:|     ) [\w ,]+: python (.+?)(?: \(|$)", log, flags=re.M):
            words = shlex.split(line)
            if words[0] == "evaluate.py":  # in place of Inception
                words += ["--extractor", "outputs/pictures-net.safetensors"]
            if "--out" in words:
                words[words.index("--out") + 1] += "-pasted"
            found.append(Step(f"{name} says: {' '.join(words[:3])}", smaller(words)))
    return found


TOKENIZER = ["train.py", "--config", "configs/own_images/tokenizer.yaml", "--data.root", "pictures"]
GENERATOR = ["train.py", "--config", "configs/own_images/generator.yaml"]
EIGHT = ["--model.generator.num_classes", str(len(CLASSES))]
ONE_LINE = ("Traceback", r"error:.*\n.*error:")


def refusals() -> list[Step]:
    """Mistakes that one line answers."""

    def refused(title: str, words: list[str], *says: str) -> Step:
        return Step(title, words, code=2, says=says, never=ONE_LINE)

    few = [*FEW, *SMALL]
    one_size = ["evaluate.py", "samples", "others", "--reference", "pictures", "--metrics", "fd"]
    one_size += ["--extractor", "demo/shapes_classifier.safetensors"]
    return [
        refused("train.py alone", ["train.py"], "--config"),
        refused("a config without --config", ["train.py", TOKENIZER[2]], "is a config: .* --config"),
        refused("evaluate.py alone", ["evaluate.py"], "say which command: samples, model, stats"),
        refused("a name that is taken", [*TOKENIZER, "--name", "pictures-tokenizer", *few], "choose another --name"),
        refused(
            "another number of classes",
            [*GENERATOR, "--name", "wrong", *few, "--model.generator.num_classes", "3"],
            f"has 3 classes; .* has {len(CLASSES)}",
        ),
        refused(
            "an option that the run decides",
            [*TOKENIZER, "--name", "decided", *few, "--trainer.log_every_n_steps", "5"],
            "set --log_every",
        ),
        refused(
            "another width on resume",
            [*TOKENIZER, "--name", "pictures-tokenizer", "--resume", "auto", "--model.tokenizer.width", "64"],
            "that is another model",
        ),
        refused(
            "a class that is misspelt",
            ["sample.py", EXPORT, "--out", "outputs/x", "--classes", "snwo"],
            "did you mean 'snow'",
        ),
        refused("a folder that is taken", ["sample.py", EXPORT, "--out", "outputs/pictures"], "--overwrite"),
        refused("folders of several sizes", one_size, "--size N|compressed with loss"),
    ]  # fmt: skip


def departures() -> list[Step]:
    """What people do after the page, or instead."""
    again = [*TOKENIZER, "--name", "pictures-tokenizer", "--resume", "auto", *SMALL]
    finished = updates_of("runs/pictures-tokenizer/run.json")
    stopped = [*TOKENIZER, "--name", "stopped", "--log_every", "1", *SMALL]
    others = ["--data", "tessellar.data.ImageFolderData", "--data.root", "others"]
    others += ["--data.size", "64"]
    return [
        Step(
            "Ctrl-C while training",
            [*stopped, "--trainer.max_steps", "100000"],
            code=130,
            interrupt="parameters: .* trained",
            makes=("runs/stopped/checkpoints/last.ckpt",),
        ),
        Step(
            "it goes on",
            [*stopped, "--resume", "auto", *FEW[2:], "--trainer.max_steps", "100001"]
            + ["--trainer.max_time", "00:00:00:04"],
            says=("goes on after update",),
        ),
        Step(
            "a finished run, given again",
            [*again, "--trainer.max_steps", str(finished)],
            says=(f"already at {finished} of {finished} updates: raise --trainer.max_steps",),
        ),
        Step(
            "a finished run goes on",
            [*again, *FEW[2:], "--trainer.max_steps", str(finished + 4)],
            says=(f"goes on after update {finished}", "export: "),
        ),
        Step(
            "epochs in place of updates, in runs elsewhere",
            [*TOKENIZER, "--name", "epochs", *SMALL, "--data.batch_size", "64", "--log_every", "1"]
            + ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--runs_root", "elsewhere"]
            + ["--trainer.val_check_interval", "2"],
            says=("export: elsewhere/epochs/export", r"update \d+ of \d+: loss"),
            makes=("elsewhere/epochs/export/model.safetensors", "elsewhere/epochs/report.html"),
        ),
        Step(
            "a run shorter than its validation interval",
            [*TOKENIZER, "--name", "short", *SMALL, "--trainer.max_steps", "2"],
            says=("lower --trainer.val_check_interval",),
            makes=("runs/short/export/model.safetensors",),
        ),
        Step(
            "a tokenizer for another size",
            [*TOKENIZER, "--name", "smaller", *FEW, *SMALL, "--data.size", "32"]
            + ["--model.tokenizer.image_size", "32"]
            + ["--model.init_from", "runs/pictures-tokenizer/export"],
            says=("resampled",),
            makes=("runs/smaller/export/model.safetensors",),
        ),
        Step(
            "samples by name",
            ["sample.py", EXPORT, "--out", "outputs/named", "--classes", "snow,beach"]
            + ["--per-class", "2"],
            makes=("outputs/named/000000_0007_snow.png",),
            screen="named",
        ),
        Step(
            "which classes are there",
            ["convert.py", "info", EXPORT],
            says=("0 beach, 1 city",),
            screen="info",
        ),
        Step(
            "fine-tuning on other classes",
            [*GENERATOR, "--name", "two", *FEW, *SMALL, "--model.init_from", EXPORT]
            + ["--model.generator.num_classes", "3", *others],
            before=other_pictures,
            says=("2 known by name .'beach', 'snow'.. 1 new .'volcano'.",),
            makes=("runs/two/export/config.yaml",),
        ),
        Step(
            "reports side by side",
            ["-c", TESSELLAR, "report", "runs/two", "runs/pictures-generator"]
            + ["--out", "outputs/two.html"],
            makes=("outputs/two.html",),
        ),
        Step("the lists", ["-c", TESSELLAR, "list", "configs"], says=("own_images/tokenizer",)),
        Step("a model", ["-c", TESSELLAR, "show", "titok_b64"], says=("titok_b64",)),
        Step("a run", ["-c", TESSELLAR, "show", "runs/two"], says=("finished",)),
        Step("which version", ["train.py", "--version"], says=(r"tessellar \d",)),
        Step("from Python", ["-c", LIBRARY], says=("2 pictures of 64 x 64",), screen="library"),
    ]


LIBRARY = f"""
import tessellar
generator = tessellar.load_generator("{EXPORT}")
images = generator.sample(classes=["snow", 0], guidance=1.5, seed=0)
print(len(images), "pictures of", "%d x %d" % images[0].size)
print(generator.encode(images).shape)
"""


def other_pictures() -> None:
    """Three folders: two of the classes that the model knows, one new."""
    for name in ("beach", "snow"):
        shutil.copytree(Path("pictures") / name, Path("others") / name)
    shutil.copytree("pictures/city", "others/volcano")


def prepared() -> list[Step]:
    """`tessellar data imagenet` on class folders, interrupted and given again."""
    words = ["-c", TESSELLAR, "data", "imagenet", "downloads/train", "downloads/val"]
    words += [
        "--out",
        "imagenet",
        "--size",
        "24",
        "--extractor",
        "demo/shapes_classifier.safetensors",
    ]
    training = ["train.py", "--config", "configs/own_images/tokenizer.yaml", "--name", "prepared"]
    training += ["--data.root", "imagenet/train", "--data.val_root", "imagenet/val", *FEW, *SMALL]
    training += ["--trainer.limit_val_batches", "4"]
    return [
        Step(
            "ImageNet's folders, interrupted",
            words,
            code=130,
            interrupt=r"train: \d",
            patience=0,
            before=downloads,
        ),
        Step(
            "and given again",
            words,
            says=("train: 80 pictures", "val: 4,000 pictures", "next: "),
            makes=("imagenet/index.json", "imagenet/val_24.npz"),
        ),
        Step("training reads them", training, says=("validation images",)),
    ]


def downloads() -> None:
    """Class folders as ImageNet has them; enough to validate on that there is time for Ctrl-C."""
    for number, name in enumerate(CLASSES):
        files = sorted(Path("pictures", name).glob("*.[jJ][pP][gG]"))
        for split, chosen, copies in (("train", files[:10], 1), ("val", files[10:15], 100)):
            folder = Path("downloads") / split / f"n0000000{number}"
            folder.mkdir(parents=True)
            for file in chosen:
                for copy in range(copies):
                    shutil.copy(file, folder / f"{file.stem}_{copy}.JPEG")


def typed() -> list[str]:
    """What a type checker says of the Python in the pages."""
    folder = Path("typed")
    folder.mkdir(exist_ok=True)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.stem != "checkpoints":
            (folder / f"{page.stem.lower()}_lines.py").write_text("\n".join(python_of(page)))
    blocks = ["from mypackage import official", *python_of(ROOT / "docs/checkpoints.md")]
    (folder / "checkpoints_lines.py").write_text("\n".join(blocks))
    (folder / "mypackage.py").write_text("from typing import Any\n\nofficial: Any\n")
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "reportMissingModuleSource": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", "typed", "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    return [] if done.returncode == 0 else done.stdout.splitlines()


def write_screens(outcomes: list[Outcome]) -> list[Path]:
    """Put the screens into the pages that ask for them; returns the pages that changed."""
    screens = {outcome.step.screen: shown(outcome) for outcome in outcomes if outcome.step.screen}
    changed = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
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


def chapters(chosen: list[str], whole: bool) -> Iterator[tuple[str, Callable[[], list[Step]]]]:
    """Names and steps of what is followed; steps are made when their turn has come."""
    for page in pages():
        if not chosen or page.name in chosen:
            for before in page.before:
                yield f"before {page.name}", before
            yield page.file, lambda page=page: steps_of(page, whole)
    if not chosen or "own" in chosen:
        yield "what comes next", pasted
        yield "departures", departures
        yield "refusals", refusals
    if not chosen or "prepared" in chosen:
        yield "tessellar data", prepared


def follow(name: str, steps: list[Step]) -> list[Outcome]:
    """Run the steps of a chapter and say how each went."""
    outcomes = []
    for step in steps:
        outcome = run(step)
        outcomes.append(outcome)
        verdict = "; ".join(outcome.wrong) or "ok"
        print(f"{outcome.cpu_seconds:6.1f} CPU-s  {name}: {step.title}: {verdict}", flush=True)
        if outcome.wrong:
            print("    " + "\n    ".join(outcome.output.splitlines()[-12:]), flush=True)
    return outcomes


def enter(folder: Path, keep: bool) -> None:
    """Make the folder of a new user, or keep it as an earlier call left it, and go there."""
    if keep and folder.is_dir():
        os.chdir(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    photographs(folder / "pictures")


def main() -> int:
    """Follow the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description="the first hour as a check")
    parser.add_argument("--page", nargs="*", default=[], help="names of pages (default: all)")
    parser.add_argument("--folder", default="outputs/first_hour")
    parser.add_argument("--keep", action="store_true", help="go on in the folder as it was left")
    parser.add_argument("--whole", action="store_true", help="the pages' own numbers of updates")
    parser.add_argument("--write", action="store_true", help="put screens into the pages")
    parser.add_argument("--count", action="store_true", help="count the commands, run none")
    options = parser.parse_args()
    if options.count:
        print(counted())
        return 0
    enter(Path(options.folder).resolve(), options.keep)
    if options.page != ["types"]:
        for command in IMPORTED:
            importlib.import_module(f"tessellar.cli.{command}")
    outcomes: list[Outcome] = []
    failed: dict[str, int] = {}
    for name, made in chapters(options.page, options.whole):
        followed = follow(name, made())
        outcomes += followed
        if wrong := sum(bool(outcome.wrong) for outcome in followed):
            failed[name] = failed.get(name, 0) + wrong
    if not options.page or "types" in options.page:
        complaints = typed()
        print("\n".join(complaints or ["the pages' Python passes the type checker"]), flush=True)
        failed |= {"types": 1} if complaints else {}
    log = "\n\n".join(shown(outcome) for outcome in outcomes)
    Path("screens.txt").write_text(f"{log}\n")
    if options.write:
        print("written:", *(path.name for path in write_screens(outcomes)))
    spent = sum(outcome.cpu_seconds for outcome in outcomes)
    print(f"{len(outcomes)} steps, {spent:.0f} CPU-seconds; screens: {Path.cwd() / 'screens.txt'}")
    print(counted())
    for name, count in failed.items():
        print(f"{name}: {count} not as expected")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
