"""`tessellar sweep`: which learning rate and which batch size a recipe is best at, by short runs.

    tessellar sweep --config demo/generator --optimizer.lr 3e-4 1e-3 3e-3 --data.batch_size 16 32

Each point is a run of `train.py` in a process of its own, so that one that runs out of memory does not
end the others. Runs are named by what they depend on: a sweep that was interrupted, or is given more
values, takes those that are there and goes on.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tessellar.cli.axes import combinations, spelled_values
from tessellar.cli.catalogue import config_file
from tessellar.cli.functions import run_functions, take_list
from tessellar.cli.spelling import spelled
from tessellar.data.dataset import digest
from tessellar.errors import UserError, writing
from tessellar.evaluation.trials import (
    Mode,
    Trial,
    at_edge,
    best_trial,
    draw_trials,
    judged,
    table_of,
)
from tessellar.pipeline import ImageGenerator, load
from tessellar.places import put_runs_into, runs_root, runs_stay
from tessellar.plain_data import read_yaml
from tessellar.protocol.packages import trust, trusted
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.training.transfer import Shape, shape_of

log = logging.getLogger(__name__)
OWN = ("updates", "samples", "metric", "mode", "share", "name", "runs-root", "package")
OWN += ("out", "axes", "options", "help")
#: Options of a run that a sweep sets itself, and what says the same here.
SET = {
    "resume": "a sweep goes on with what is there",
    "trainer.max_steps": "set --updates or --samples",
    "trainer.max_epochs": "set --updates or --samples",
    "dry_run": "train.py tries a config",
    "print_config": "train.py prints a config",
}
#: Parts of a training module that are meant where an option begins with them.
OF_MODEL = ("optimizer", "schedule")
MOST_RUNS = 200
LONGEST_LABEL = 100


def sweep(
    configs: list[str],
    updates: int | None = None,
    samples: int | None = None,
    metric: str = "train/loss",
    mode: Literal["min", "max"] = "min",
    share: float = 0.1,
    name: str = "",
    runs_root: str = "",
    package: str = "",
    out: str = "outputs/sweep",
    axes: dict[str, list[str]] = {},  # noqa: B006
    options: tuple[str, ...] = (),
) -> int:
    """Try learning rates, batch sizes or any other options of train.py by short runs of one seed.

    An option with several values is swept: --optimizer.lr 1e-4 3e-4 --data.batch_size 16 32 are four
    runs, and every other option goes to all of them. What there is already is taken, so an
    interrupted sweep goes on and a wider one adds to it.

    Args:
        configs: YAML of a run, or the name of one of ours; --config NAME says the same
        updates: updates of each run, each with its whole schedule (default: 200)
        samples: instead, training samples of each run, whatever its batch size
        metric: what runs are compared by, a column of metrics.csv
        mode: min or max: which value of it is best
        share: of the updates, the last ones whose mean counts
        name: begin of the runs' names (default: the config's)
        runs_root: where runs lie (default: what TESSELLAR_RUNS names, or runs)
        package: packages of others whose classes may be built, separated by commas
        out: folder to write: sweep.json, sweep.png, preset.yaml
        axes: the same as several values behind an option: '{"model.optimizer.lr": ["1e-4", "3e-4"]}'
        options: the same as options of train.py, as one list of words
    """
    if updates is not None and samples is not None:
        raise UserError("--updates and --samples both say how long a run is: give one")
    check_whole("--updates", 200 if updates is None else updates, least=2)
    check_whole("--samples", 2 if samples is None else samples, least=2)
    check_number("--share", share, above=0, most=1)
    trust(package)
    points = combinations(axes, most=MOST_RUNS)
    if not points[0]:
        raise UserError("nothing is swept: give an option several values, --optimizer.lr 1e-4 3e-4")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    sweeping = Sweeping(configs, updates, samples, name, package, options)
    with runs_stay():
        if runs_root:
            put_runs_into(runs_root)
        log.info("%d runs, one after another; writes %s", len(points), out)
        trials = []
        for number, values in enumerate(points, start=1):
            log.info("run %d of %d: %s", number, len(points), spelled_values(values))
            ended, code = sweeping.ended(values)
            if code:
                log.info("interrupted: the same command goes on")
                return code
            trial = ended
            if not trial.fault:
                metrics = sweeping.folder(values) / "metrics.csv"
                trial = judged(trial, metrics, metric, mode, share)
            said = trial.fault if trial.value is None else f"{metric} {trial.value:.5g}"
            log.info("%s", said)
            trials.append(trial)
        report(sweeping, trials, metric, mode, Path(out))
    return 0


class Sweeping:
    """The runs of one sweep: how long each is, what it is called, and how it is started."""

    def __init__(
        self,
        configs: Sequence[str],
        updates: int | None,
        samples: int | None,
        name: str,
        package: str,
        options: Sequence[str],
    ) -> None:
        self.files = [config_file(one) for one in configs]
        self.configs = configs
        self.contents = [read_yaml(file) or {} for file in self.files]
        self.updates = updates
        self.samples = samples
        last = Path(self.files[-1])
        self.name = name or f"{last.parent.name}-{last.stem}".lstrip("-")
        self.package = ["--package", package] if package else []
        self.options = list(options)

    def length(self, values: Mapping[str, str]) -> int:
        """Updates of the run at `values`."""
        if self.samples is None:
            return self.updates or 200
        batch = 1
        for option, default in (("data.batch_size", None), ("model.accumulate", 1)):
            batch *= self.number(option, values, default)
        devices = self.number("trainer.devices", values, 1)
        return max(2, round(self.samples / (batch * devices)))

    def number(self, option: str, values: Mapping[str, str], default: int | None) -> int:
        """A whole number that a run is given; raises UserError where nothing says it."""
        found: Any = self.given().get(option, values.get(option))
        for content in reversed(self.contents):
            if found is None:
                part = content.get(option.partition(".")[0]) or {}
                part = part.get("init_args", part)
                found = part.get(option.partition(".")[2])
        found = default if found in (None, "auto") else found
        try:
            return int(found)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--samples needs to know {option}, which is {found!r}: give --{option} a number"
            ) from error

    def given(self) -> dict[str, str]:
        """Options that every run has, with their values."""
        found = {}
        for option, value in zip(self.options, self.options[1:], strict=False):
            if option.startswith("--"):
                found[option.removeprefix("--")] = value
        return found

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Words of train.py, but for the run's name."""
        updates = self.length(values)
        words: list[str] = []
        for file in self.files:
            words += ["--config", str(file)]
        words += [*self.package, "--trainer.max_steps", str(updates)]
        # Rows enough to smooth; what the user gives comes later and counts.
        words += [
            "--log_every",
            str(max(1, updates // 200)),
            "--save_every",
            str(max(1, updates // 4)),
        ]
        words += self.options
        for option, value in values.items():
            words += [f"--{option}", value]
        return words

    def run_name(self, values: Mapping[str, str]) -> str:
        """The run's name: the point for the reader, a digest of all that it depends on."""
        label = "-".join(f"{option.rpartition('.')[2]}_{value}" for option, value in values.items())
        label = re.sub(r"[^\w.+-]", "_", label)[:LONGEST_LABEL]
        texts = [Path(file).read_text(encoding="utf-8") for file in self.files]
        words = [word for word in self.words(values) if word not in map(str, self.files)]
        return f"{self.name}-{label}-{digest(configs=texts, words=words)[:6]}"

    def folder(self, values: Mapping[str, str]) -> Path:
        return runs_root() / self.run_name(values)

    def said(self, values: Mapping[str, str]) -> dict[str, Any]:
        """What run.json says of a point; nothing where it has not begun."""
        try:
            return json.loads((self.folder(values) / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def ended(self, values: Mapping[str, str]) -> tuple[Trial, int]:
        """The run at `values`, made or found, without its value, and the code of a signal that ended
        it. Raises UserError where its options do not fit.
        """
        trial = Trial(values, self.run_name(values), self.length(values))
        said = self.said(values)
        export = self.folder(values) / "export"
        if said.get("status") == "finished" and export.exists():
            return self.with_facts(trial, said), 0
        if said.get("diverged"):
            return self.with_facts(trial, said), 0
        code, error = train(["--name", trial.run, "--resume", "auto", *self.words(values)])
        said = self.said(values)
        if said.get("diverged"):
            return self.with_facts(trial, said), 0
        if code == 2:
            raise UserError(f"{spelled_values(values)}: {error.removeprefix('error: ')}")
        if said.get("status") == "interrupted" and code > 128:
            return trial, code
        if code:
            fault = f"failed: {error or f'exit code {code}'}"
            return Trial(values, trial.run, trial.updates, fault=fault), 0
        return self.with_facts(trial, said), 0

    def with_facts(self, trial: Trial, said: Mapping[str, Any]) -> Trial:
        """`trial` with what run.json says of it."""
        fault = ""
        if said.get("diverged"):
            fault = f"diverged: {said.get('error', '')}".partition(";")[0]
        return Trial(trial.values, trial.run, trial.updates, said.get("samples_seen"), fault=fault)


def train(words: Sequence[str]) -> tuple[int, str]:
    """`train.py` in a process of its own; its exit code and the last line of its errors.

    A signal that would end this process is handed on, and the run waited for, which leaves a
    checkpoint; then this process ends too.
    """
    received: list[int] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tessellar.cli", "train", *words],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ,
        )

        def hand_on(number: int, _: object) -> None:
            received.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal has told the run too
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        if received:
            log.info("interrupted: the same command goes on")
            raise SystemExit(128 + received[0])
        said.seek(0)
        lines = said.read().strip().splitlines()
    return code if code >= 0 else 128 - code, lines[-1] if lines else ""


def report(sweeping: Sweeping, trials: Sequence[Trial], metric: str, mode: Mode, out: Path) -> None:
    """Write table, picture and preset; print the table and the commands that come next."""
    chosen = best_trial(trials, mode)
    shape = shape_of_run(sweeping.folder(chosen.values))
    words = [f"--config {shlex.quote(str(one))}" for one in sweeping.configs]
    words += map(shlex.quote, [*sweeping.package, *sweeping.options])
    words += [f"--{option} {shlex.quote(value)}" for option, value in chosen.values.items()]
    command = " ".join([spelled("train"), *words])
    out.mkdir(parents=True, exist_ok=True)
    preset = preset_of(sweeping, chosen, shape)
    content = {
        "configs": list(sweeping.configs),
        "options": sweeping.options,
        "metric": metric,
        "mode": mode,
        "trials": [trial.record() for trial in trials],
        "chosen": dict(chosen.values),
        "next": command,
        "preset": preset,
    }
    path = out / "sweep.json"
    with writing(path, unfinished=path):
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_trials(trials, chosen, metric, out / "sweep.png")
    print(table_of(trials, chosen, metric))
    for line in at_edge(trials, chosen):
        print(line)
    print(f"next: {command}")
    if preset:
        path = out / "preset.yaml"
        with writing(path, unfinished=path):
            path.write_text(yaml.safe_dump(preset, sort_keys=False), encoding="utf-8")
        assert shape is not None
        print(
            f"at another width or depth, from {shape.width} x {shape.depth} here: "
            f"{spelled('train')} --config CONFIG --config {path}"
        )
    print(f"written: {out}")


def shape_of_run(folder: Path) -> Shape | None:
    """Width and depth of what a run trained; None where it has no hidden matrices, or was carried from
    another width already.
    """
    settings = read_yaml(folder / "config.yaml")["model"]["init_args"]
    if (settings.get("optimizer") or {}).get("transfer") is not None:
        return None
    model = load(str(folder / "export"), device="cpu", trust=trusted())
    try:
        if isinstance(model, ImageGenerator):
            return shape_of(model.generator, model.conditioner)
        return shape_of(model)
    except UserError:
        return None


def preset_of(sweeping: Sweeping, chosen: Trial, shape: Shape | None) -> dict[str, Any]:
    """A config to lay over another: what was chosen or given of the optimizer and the batch, and the
    width and depth that it was chosen at, by which rates, starts and decays are carried to others.

    A rate is worth nothing without the kind of optimizer that it was chosen for.
    """
    if shape is None:
        return {}
    settings = read_yaml(sweeping.folder(chosen.values) / "config.yaml")["model"]["init_args"]
    optimizer: dict[str, Any] = {"name": settings["optimizer"]["name"]}
    preset: dict[str, Any] = {}
    for option, value in {**sweeping.given(), **chosen.values}.items():
        number = yaml.safe_load(value)
        if isinstance(number, str) and re.fullmatch(r"[\d.]+e[+-]?\d+", number):
            number = float(number)  # YAML takes 1e-4 for a word
        if option.startswith("model.optimizer."):
            optimizer[option.removeprefix("model.optimizer.")] = number
        elif option == "data.batch_size":
            preset["data"] = {"init_args": {"batch_size": number}}
    optimizer["transfer"] = {"base_width": shape.width, "base_depth": shape.depth}
    return {"model": {"init_args": {"optimizer": optimizer}}, **preset}


def with_points(argv: Sequence[str]) -> list[str]:
    """Words of a sweep: options of train.py with several values become `--axes`, the others
    `--options`.
    """
    words = list(argv)
    configs: list[str] = []
    own: list[str] = []
    others: list[str] = []
    axes: dict[str, list[str]] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        is_option = word.startswith("--")
        values = [value] if equals else take_list(words, 0, {}) if is_option else []
        if name == "config" or not word.startswith("-"):
            configs += values if is_option else [word]
            continue
        if word == "-h" or name.replace("_", "-") in OWN:
            own += [word.partition("=")[0], *values]
            continue
        if name.partition(".")[0] in OF_MODEL:
            name = f"model.{name}"
        if name in SET:
            raise UserError(f"--{name} is set by the sweep: {SET[name]}")
        if len(values) > 1:
            axes[name] = values
        else:
            others += [f"--{name}", *values]
    if axes:
        own.append(f"--axes={json.dumps(axes)}")
    if others:
        own.append(f"--options={json.dumps(others)}")
    return [*configs, *own]


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `tessellar sweep`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_functions(sweep, with_points(words), "sweep")
