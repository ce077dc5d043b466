"""Alignment on Fashion-MNIST: VA-pi and CCA from the README's generator, beside as many updates of cross-entropy alone.

    python -m benchmarks.studies.alignment --data DIR --extractor FILE [--seeds 0 1] [--count 10000] [--only NAME ...]

Trains the README's tokenizer and generator where they are not there, then each method from that export for every seed
(float32, one thread), measures each without guidance and at every other scale, and writes
benchmarks/results/studies/alignment.json: distance, precision and recall, class accuracy. The best scale of a run is
the one of its smallest distance. What is there is not made again; what was interrupted goes on.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.steps import Training, measured, write_results

NAME = "alignment"
UPDATES = 200
SCALES = (1.0, 1.25, 1.5, 2.0)
RATE = ("--model.init_args.optimizer.name", "adamw", "--model.init_args.optimizer.lr", "0.0001")
TOKENIZER = Training("tokenizer", "configs/fashion_mnist/tokenizer.yaml")


def source(runs: Path) -> Training:
    """The README's generator."""
    tokenizer = TOKENIZER.folder(runs) / "export"
    options = ("--model.init_args.tokenizer", str(tokenizer))
    return Training("generator", "configs/fashion_mnist/generator.yaml", options)


def trainings(runs: Path, seed: int) -> dict[str, Training]:
    """Every method from the generator's export, and the control, of one seed."""
    export = str(source(runs).folder(runs) / "export")
    seeded = ("--seed_everything", str(seed), "--trainer.max_steps", str(UPDATES))
    common = (*seeded, *RATE)
    aligned = ("--model.init_args.source", export, *common)
    contrasted = ("--model.init_args.source", export, *seeded)  # at its config's rate
    control = (
        *("--model.init_args.tokenizer", str(TOKENIZER.folder(runs) / "export")),
        *("--model.init_args.init_from", export),
        *("--model.init_args.schedule.decay", "constant", "--data.init_args.batch_size", "16"),
        *common,
    )
    folder = "configs/fashion_mnist"
    chosen = {
        "cross-entropy alone": ("control", f"{folder}/generator.yaml", control),
        "VA-pi": ("va_pi", f"{folder}/va_pi.yaml", aligned),
        "STE": ("straight_through", f"{folder}/straight_through.yaml", aligned),
        "CCA": ("cca", f"{folder}/cca.yaml", contrasted),
    }
    made = {}
    for title, (name, config, options) in chosen.items():
        made[title] = Training(f"{name}-{seed}", config, options)
    return made


def measurements(export: Path, runs: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Metrics of an export at every scale."""
    rows = []
    for scale in given.scales:
        record = runs / "records" / f"{export.parent.name}-{scale}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        words = ["model", str(export), "--extractor", str(given.extractor)]
        words += ["--count", str(given.count), "--metrics", "[fd,pr,accuracy]"]
        words += ["--guidance.scale", str(scale), "--seed", "100000"]
        found = measured(record, "evaluate.py", *words)
        rows.append({"scale": scale, **found["metrics"]})
    return rows


def row_of(title: str, seed: int | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One run: without guidance, and at its best scale."""
    distance = next(name for name in rows[0] if name.startswith("FD("))
    best = min(rows, key=lambda row: row[distance])
    plain = next(row for row in rows if row["scale"] == 1.0)
    return {"method": title, "seed": seed, "plain": plain, "best": best, "all": rows}


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="VA-pi and CCA against cross-entropy alone.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="the network that judges")
    parser.add_argument("--runs", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", help="methods by their titles (default: all)")
    given = parser.parse_args(argv)
    if 1.0 not in given.scales:
        parser.error("--scales needs 1, which is no guidance")
    runs = given.runs.resolve()
    data = given.data.resolve()
    given.extractor = given.extractor.resolve()
    TOKENIZER.make(runs, data)
    start = source(runs).make(runs, data)
    rows = [row_of("before", None, measurements(start, runs, given))]
    for seed in given.seeds:
        for title, training in trainings(runs, seed).items():
            if given.only and title not in given.only:
                continue
            export = training.make(runs, data)
            row = row_of(title, seed, measurements(export, runs, given))
            rows.append({**row, **training.facts(runs)})
            write_results(NAME, rows, updates=UPDATES, count=given.count)
    write_results(NAME, rows, updates=UPDATES, count=given.count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
