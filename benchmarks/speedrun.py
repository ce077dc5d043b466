"""From images to FD(fmnist-resnet10t) of at most 2.0 in the fewest CPU-seconds: an entry is timed, measured, recorded.

    python benchmarks/speedrun.py --data DIR --network NET [--entry baseline] [--seeds 0 1 2] [--append]
    python benchmarks/speedrun.py --data DIR --network NET --updates 2      # whether everything works

Rules and records: docs/speedrun.md. An entry is a YAML in benchmarks/speedruns. Its stages run one after another for
each seed, in processes of their own, whose user and system seconds with those of their children are the time. Then
10,000 samples are measured under the protocol fmnist-10k, and the checkpoints on the way with fewer, outside of the
time. What is finished stays in the folder: the same command goes on after the last finished stage.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from tessellar.checkpoints.card import commit
from tessellar.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ROOT / "benchmarks" / "speedruns"
RECORDS = ROOT / "benchmarks" / "results" / "speedrun.json"
PAGE = ROOT / "docs" / "speedrun.md"
MARKS = ("<!-- records: written by benchmarks/speedrun.py -->", "<!-- end of records -->")
TARGET = 2.0
METRIC = "FD(fmnist-resnet10t)"
SAMPLES = 10_000
CURVE_POINTS = 4  # checkpoints of the last stage that are measured too
CURVE_SAMPLES = 1_000
FEW_SAMPLES = 20  # of a trial with --updates
SEEDS = (0, 1, 2)  # of a record


@dataclass(frozen=True)
class Stage:
    """One command of an entry: its name, its words with fields to fill in, and its updates."""

    name: str
    command: str
    updates: int


@dataclass(frozen=True)
class Entry:
    """What is run and measured; `model` is a run, `sampling` options of `evaluate.py model`."""

    name: str
    what: str
    stages: tuple[Stage, ...]
    model: str
    sampling: str


@dataclass(frozen=True)
class Attempt:
    """One seed: CPU-seconds by stage, the distance at the end, and (CPU-seconds, distance) on the way."""

    seed: int
    cpu_seconds: dict[str, float]
    distance: float
    accuracy: float | None
    curve: list[tuple[float, float]]

    @property
    def total(self) -> float:
        return sum(self.cpu_seconds.values())


def read_entry(name: str) -> Entry:
    """The entry of benchmarks/speedruns; raises UserError where there is none."""
    file = ENTRIES / f"{name}.yaml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in ENTRIES.glob("*.yaml")))
        raise UserError(f"there is no entry {name!r}; there are {there}")
    facts = yaml.safe_load(file.read_text(encoding="utf-8"))
    stages = tuple(Stage(**stage) for stage in facts["stages"])
    return Entry(name, facts["what"], stages, facts["model"], facts["sampling"])


def timed(words: Sequence[str], log: Path) -> float:
    """User and system seconds of a command and of all processes that it waited for.

    Raises UserError, naming its log, where it fails.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{shlex.join(words)} ended with {process.returncode}: see {log}")
    return usage.ru_utime + usage.ru_stime


class Speedrun:
    """An entry on a data set, measured by a network, in a folder; `updates` makes it a trial."""

    def __init__(
        self, entry: Entry, data: Path, network: Path, folder: Path, updates: int | None = None
    ) -> None:
        self.entry = entry
        self.data = data.resolve()
        self.network = network.resolve()
        self.folder = folder.resolve()
        self.updates = updates
        self.runs = self.folder / "runs"

    def attempt(self, seed: int) -> Attempt:
        """Run all stages with one seed, then measure; what an earlier command finished is taken."""
        run = f"{self.entry.name}-{seed}"
        seconds = self.stages(run, seed)
        model = self.runs / self.entry.model.format(run=run)
        metrics = self.measured(model / "export", seed, self.count(SAMPLES))
        curve = self.curve(model, seed, seconds)
        total = round(sum(seconds.values()), 1)
        curve.append((total, metrics[self.metric(metrics)]))
        return Attempt(
            seed,
            {name: round(value, 1) for name, value in seconds.items()},
            distance=metrics[self.metric(metrics)],
            accuracy=metrics.get("accuracy"),
            curve=curve,
        )

    def stages(self, run: str, seed: int) -> dict[str, float]:
        """CPU-seconds of every stage by its name.

        Raises UserError where a stage was begun at another commit, with other settings, or was
        stopped within.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / f"{run}.json"
        settings = {"commit": commit(), "entry": asdict(self.entry), "updates": self.updates}
        settings = json.loads(json.dumps(settings))
        found: dict[str, Any] = {"settings": settings, "cpu_seconds": {}}
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise UserError(
                f"{kept} is of another commit or of other settings: give another --folder"
            )
        seconds = found["cpu_seconds"]
        for stage in self.entry.stages:
            if stage.name in seconds:
                continue
            log = self.folder / f"{run}-{stage.name}.log"
            if log.exists():
                raise UserError(
                    f"{log} is of a stage that did not end: give another --folder, or remove it and its run"
                )
            seconds[stage.name] = timed(self.words(stage, run, seed), log)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return seconds

    def words(self, stage: Stage, run: str, seed: int) -> list[str]:
        """The command of a stage with its updates and milestones."""
        filled = stage.command.format(run=run, data=self.data, seed=seed, runs=self.runs)
        updates = self.updates or stage.updates
        words = [sys.executable, *shlex.split(filled), "--runs_root", str(self.runs)]
        words += ["--trainer.max_steps", str(updates)]
        if self.updates:
            words += [
                "--trainer.val_check_interval",
                str(updates),
                "--trainer.limit_val_batches",
                "1",
                "--trainer.check_val_every_n_epoch",  # epochs of a few images are shorter
                "null",
            ]
        if stage == self.entry.stages[-1] and updates >= CURVE_POINTS:
            words += ["--keep_every", str(updates // CURVE_POINTS)]
        return words

    def count(self, samples: int) -> int:
        return FEW_SAMPLES if self.updates else samples

    def metric(self, metrics: dict[str, float]) -> str:
        """The distance's name: the record's own, or that of a trial with another network."""
        return next(name for name in metrics if name.startswith("FD("))

    def measured(self, model: Path, seed: int, count: int) -> dict[str, float]:
        """Metrics of `count` samples whose seeds begin at 10,000 x seed, against the training images."""
        out = self.folder / f"measured-{self.name_of(model)}-{count}.json"
        if out.is_file():
            return json.loads(out.read_text(encoding="utf-8"))["metrics"]
        words = [
            sys.executable,
            "evaluate.py",
            "model",
            str(model),
            "--extractor",
            str(self.network),
        ]
        words += ["--data", "tessellar.data.FashionMNISTData", "--data.root", str(self.data)]
        words += [
            *shlex.split(self.entry.sampling),
            "--seed",
            str(10_000 * seed),
            "--out",
            str(out),
        ]
        whole = count == SAMPLES
        words += ["--protocol", "fmnist-10k"] if whole else ["--count", str(count)]
        words += ["--metrics", "fd", "accuracy"] if whole else ["--metrics", "fd"]
        timed(words, out.with_suffix(".log"))
        return json.loads(out.read_text(encoding="utf-8"))["metrics"]

    def name_of(self, model: Path) -> str:
        """The run and its export or checkpoint, as a file's name."""
        return "-".join(model.relative_to(self.runs).with_suffix("").parts)

    def curve(self, model: Path, seed: int, seconds: dict[str, float]) -> list[tuple[float, float]]:
        """(CPU-seconds, distance) of the last stage's milestones, those at its end left out.

        Their seconds are the stages' before and the share of the last that its updates are.
        """
        last = self.entry.stages[-1]
        updates = self.updates or last.updates
        before = sum(value for name, value in seconds.items() if name != last.name)
        points = []
        for file in sorted((model / "checkpoints").glob("update_*.ckpt")):
            done = int(file.stem.removeprefix("update_"))
            if done >= updates:
                continue
            metrics = self.measured(file, seed, self.count(CURVE_SAMPLES))
            spent = before + seconds[last.name] * done / updates
            points.append((round(spent, 1), metrics[self.metric(metrics)]))
        return points


def why_not(attempts: Sequence[Attempt], trial: bool) -> str:
    """What an entry's attempts lack to be a record; "" where they are one."""
    seeds = sorted(attempt.seed for attempt in attempts)
    if trial:
        return "a trial of a few updates"
    if seeds != list(SEEDS):
        return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} alone"
    if any(attempt.distance > TARGET for attempt in attempts):
        return "the target was missed"
    if commit().endswith("-dirty"):
        return "the sources were changed after their commit"
    return ""


def record_of(entry: Entry, attempts: Sequence[Attempt], trial: bool) -> dict[str, Any]:
    """What is kept of an entry's attempts."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "entry": entry.name,
        "what": entry.what,
        "trial": trial,
        "target": TARGET,
        "metric": METRIC,
        "reached": not why_not(attempts, trial),
        "why_not": why_not(attempts, trial),
        "cpu_seconds": round(mean(attempt.total for attempt in attempts), 1),
        "seeds": [asdict(attempt) for attempt in attempts],
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, its cores, the threads that torch takes, and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records, the fastest first; below them attempts that are none, with the reason."""
    ordered = sorted(records, key=lambda record: record["cpu_seconds"])
    held = [record for record in ordered if record["reached"]]
    others = [record for record in ordered if not record["reached"]]
    text = rows(held) if held else "No record has been set yet."
    if others:
        text += f"\n\nTried, and no record:\n\n{rows(others)}"
    return text


def rows(records: Sequence[dict[str, Any]]) -> str:
    """A table with a row a record, which says what it lacks."""
    lines = [
        "| CPU-seconds | entry | FD by seed | date | commit | machine |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        distances = ", ".join(f"{seed['distance']:.2f}" for seed in record["seeds"])
        facts = record["machine"]
        lacks = record["why_not"]
        told = f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}"
        cells = [
            f"{record['cpu_seconds']:.0f}",
            f"`{record['entry']}`: {record['what']}" + (f" ({lacks})" if lacks else ""),
            distances,
        ]
        cells += [record["date"], record["commit"], told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def append(record: dict[str, Any], records: Path = RECORDS, page: Path = PAGE) -> None:
    """Add a record to the file of all, and write the page's table anew; raises UserError for a trial."""
    if record["trial"]:
        raise UserError("a trial with --updates is no record: leave --append out")
    known = json.loads(records.read_text(encoding="utf-8")) if records.is_file() else []
    known.append(record)
    records.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    page.write_text(with_table(page.read_text(encoding="utf-8"), known), encoding="utf-8")


def with_table(text: str, records: Sequence[dict[str, Any]]) -> str:
    """The page with its table between the marks."""
    start, end = MARKS
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{table(records)}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--network", type=Path, required=True, help="fmnist_resnet10t.safetensors")
    parser.add_argument("--entry", default="baseline", help="a YAML of benchmarks/speedruns")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="a trial: so many updates a stage")
    parser.add_argument("--folder", type=Path, default=Path("outputs/speedrun"))
    parser.add_argument("--append", action="store_true", help="add the record to those of the page")
    options = parser.parse_args(argv)
    if options.append and options.updates:
        parser.error("a trial with --updates is no record: leave --append out")
    entry = read_entry(options.entry)
    speedrun = Speedrun(entry, options.data, options.network, options.folder, options.updates)
    attempts = []
    for seed in options.seeds:
        attempt = speedrun.attempt(seed)
        attempts.append(attempt)
        print(
            f"seed {seed}: {attempt.total:.0f} CPU-seconds, distance {attempt.distance:.3f}",
            flush=True,
        )
    record = record_of(entry, attempts, trial=options.updates is not None)
    target = options.folder / "record.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{record['cpu_seconds']:.0f} CPU-seconds on average; target reached: {record['reached']}; wrote {target}"
    )
    if options.append:
        append(record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
