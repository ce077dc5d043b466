"""Alignment on Fashion-MNIST: VA-pi, its straight-through baseline and CCA from the README's generator, beside as many
updates of cross-entropy alone.

    python -m benchmarks.studies.alignment --data DIR --extractor FILE [--seeds 0 1] [--only METHOD ...] [--runs DIR]

Trains the README's tokenizer and generator where they are not there, then each method from that export. Of every method
two learning rates are tried with the first seed; the one that draws better without guidance, on tuning seeds, is
trained with the others. Each run is swept over guidance scales on tuning seeds; without guidance and at the chosen
scale it is measured on other seeds, by the given network, which chose, and by a second one, which did not. Writes
benchmarks/results/studies/alignment.json, prints the table of docs/alignment.md. What is there is not made again.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.steps import (
    EXPORTS,
    Training,
    command,
    measured,
    read_results,
    write_results,
)

NAME = "alignment"
UPDATES = 200
SCALES = (1.0, 1.25, 1.5, 2.0)
TUNING = 1000  # images at each scale
REPORTED = 5000  # images without guidance and at the chosen scale, of other seeds
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
FOLDER = "configs/fashion_mnist"
PRECISION = ("--trainer.precision", "bf16-mixed")  # as the configs have it
TOKENIZER = Training("tokenizer", f"{FOLDER}/tokenizer.yaml", PRECISION)
BEFORE = "before"


@dataclass(frozen=True)
class Method:
    """Title, name of its runs, config, and the learning rates that are tried."""

    title: str
    name: str
    config: str
    rates: tuple[float, ...]
    words: tuple[str, ...] = ()


# Batches and optimizer of the alignments, so that an update costs the data alike.
ALONE = (
    *("--model.init_args.optimizer.name", "adamw", "--model.init_args.schedule.decay", "constant"),
    *("--data.init_args.batch_size", "16"),
)
METHODS = (
    Method("cross-entropy alone", "control", f"{FOLDER}/generator.yaml", (1e-4, 1e-5), ALONE),
    Method("VA-pi", "va_pi", f"{FOLDER}/va_pi.yaml", (1e-4, 1e-5)),
    Method("straight-through", "straight_through", f"{FOLDER}/straight_through.yaml", (1e-4, 1e-5)),
    Method("CCA", "cca", f"{FOLDER}/cca.yaml", (1e-5, 3e-6)),
)


def source(runs: Path) -> Training:
    """The README's generator."""
    tokenizer = TOKENIZER.folder(runs) / "export"
    options = (*PRECISION, "--model.init_args.tokenizer", str(tokenizer))
    return Training("generator", f"{FOLDER}/generator.yaml", options)


def training(method: Method, rate: float, seed: int, runs: Path) -> Training:
    """A run from the generator's export, validated at its end."""
    export = str(source(runs).folder(runs) / "export")
    words = [*PRECISION, "--seed_everything", str(seed), *method.words]
    words += ["--trainer.max_steps", str(UPDATES), "--trainer.val_check_interval", str(UPDATES)]
    words += ["--trainer.limit_val_batches", "16", "--model.init_args.optimizer.lr", str(rate)]
    if method.name == "control":
        words += ["--model.init_args.tokenizer", str(TOKENIZER.folder(runs) / "export")]
        words += ["--model.init_args.init_from", export]
    else:
        words += ["--model.init_args.source", export]
    return Training(f"{method.name}-{rate:g}-{seed}", method.config, tuple(words))


def measurements(made: Training, given: argparse.Namespace) -> dict[str, Any]:
    """A run swept over the scales; what it gives without guidance and at the chosen scale."""
    folder = made.folder(given.runs)
    networks = (str(given.extractor), str(SECOND))
    common = (
        *(str(folder / "export"), "--extractor", *networks, "--precision", "bf16"),
        *("--metrics", "[fd,pr,accuracy]", *FASHION, str(given.data)),
        *("--batch_size", "250", "--cache", str(given.runs / ".cache")),
    )
    swept_in = folder / "sweep"
    if not (swept_in / "sweep.json").exists():
        axes = json.dumps({"guidance.scale": list(SCALES)})
        command(
            "evaluate.py",
            *("sweep", *common, "--axes", axes, "--out", str(swept_in)),
            *("--count", str(TUNING), "--final_count", str(REPORTED)),
        )
    swept = json.loads((swept_in / "sweep.json").read_text(encoding="utf-8"))
    # The seeds of the sweep's last measurement.
    seeds = ("--count", str(REPORTED), "--seed", str(TUNING))
    plain = measured(folder / "plain.json", "evaluate.py", "model", *common, *seeds)
    return {
        "tuning": swept["points"],
        "plain": plain["metrics"],
        "scale": swept["chosen"]["guidance.scale"],
        "best": swept["final"]["metrics"],
    }


def distance_of(metrics: dict[str, float]) -> float:
    """By the network that is given first."""
    return next(value for name, value in metrics.items() if name.startswith("FD("))


def plain_on_tuning_seeds(row: dict[str, Any]) -> float:
    """The distance without guidance by which a rate is chosen."""
    for point in row["tuning"]:
        if point["values"]["guidance.scale"] == 1.0:
            return distance_of(point["metrics"])
    raise ValueError("no scale of 1 was tried")


def rows_of(method: Method, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Both rates with the first seed, the better one with the others."""
    rows = []
    for rate in method.rates:
        rows.append(row_of(method, rate, given.seeds[0], given))
    best = min(rows, key=plain_on_tuning_seeds)
    for row in rows:
        row["chosen"] = row is best
    for seed in given.seeds[1:]:
        rows.append({**row_of(method, best["rate"], seed, given), "chosen": True})
    return rows


def row_of(method: Method, rate: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    made = training(method, rate, seed, given.runs)
    made.make(given.runs, given.data)
    facts = {"name": method.title, "rate": rate, "seed": seed, "training": made.facts(given.runs)}
    return {**facts, **measurements(made, given)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a run, without guidance and at its chosen scale."""
    names = list(rows[0]["plain"])
    titles = ["method", "rate", "seed", *names, "scale", *(f"there: {name}" for name in names)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"] + ("" if row["chosen"] else " (not chosen)")]
        cells += [f"{row['rate']:g}" if row["rate"] else "-", str(row["seed"])]
        cells += [f"{row['plain'][name]:.3f}" for name in names]
        cells += [f"{row['scale']:g}", *(f"{row['best'][name]:.3f}" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Rows of all methods, or of those named by `--only`."""
    parser = argparse.ArgumentParser(description="VA-pi and CCA against cross-entropy alone")
    parser.add_argument("--data", type=Path, required=True, help="the folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="the network that chooses")
    parser.add_argument("--runs", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=[one.title for one in METHODS])
    given = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(given, name, getattr(given, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    TOKENIZER.make(given.runs, given.data)
    start = source(given.runs)
    start.make(given.runs, given.data)
    facts = {"name": BEFORE, "rate": 0.0, "seed": 0, "chosen": True}
    before = {**facts, "training": start.facts(given.runs), **measurements(start, given)}
    titles = [BEFORE, *(method.title for method in METHODS)]
    for method in METHODS:
        if given.only is not None and method.title not in given.only:
            continue
        rows = [before, *rows_of(method, given)]
        kept = [
            row for row in read_results(NAME)["rows"] if row["name"] not in (BEFORE, method.title)
        ]
        ordered = sorted([*kept, *rows], key=lambda row: titles.index(row["name"]))
        write_results(NAME, ordered, updates=UPDATES, tuning=TUNING, reported=REPORTED)
        print(table(ordered), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
