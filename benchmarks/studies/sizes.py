"""Does a model of 256 tokens that is made from one of 64 start below a fresh one, and stay there?
Fashion-MNIST.

    python -m benchmarks.studies.sizes --data DIR [--runs DIR] [--runs_at_once N]

Trains a ViT-VQ of 64 tokens (32 pixels) and a LlamaGen on it, then both at 64 pixels, 256 tokens, once
from those (`init_from`: positions are resampled, rotations follow the grid) and once fresh: the same
seed, so the same batches in the same order. Both generators read the tokens of the tokenizer that was
made from the smaller one. Writes benchmarks/results/studies/sizes.json and docs/pictures/sizes.png and
prints the table of docs/checkpoints.md. What is there is not made again; `--runs_at_once` ends after so many
runs that were missing.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.studies.steps import ROOT, Training, write_results
from tessellar.evaluation.pictures import columns_of
from tessellar.evaluation.trials import smoothed

NAME = "sizes"
PLOT = ROOT / "docs" / "pictures" / "sizes.png"
TOKENIZER = "configs/fashion_mnist/tokenizer.yaml"
GENERATOR = "configs/fashion_mnist/generator.yaml"
SMALL_UPDATES = {"tokenizer": 500, "generator": 500}
UPDATES = {"tokenizer": 150, "generator": 150}
BATCHES = {"tokenizer": 16, "generator": 16}
# Narrow ones, briefly: a minute or two of one core each.
WIDTHS = {
    "tokenizer": ("--model.tokenizer.width", "96", "--model.tokenizer.decoder_depth", "3"),
    "generator": (
        *("--model.generator.width", "64", "--model.generator.depth", "3"),
        *("--model.generator.num_heads", "2"),
    ),
}
SHARE = 0.1  # of the updates, whose mean is drawn


def training(kind: str, size: int, name: str, *further: str) -> Training:
    """A run of one kind at a size of images; every batch is logged."""
    updates = (SMALL_UPDATES if size == 32 else UPDATES)[kind]
    batch = 32 if size == 32 else BATCHES[kind]
    every = 15
    if size == 32 or kind == "generator":  # which draws pictures whenever it is validated
        every = updates
    options = (
        *("--data.size", str(size), "--data.batch_size", str(batch), "--log_every", "1"),
        *("--trainer.max_steps", str(updates), "--trainer.val_check_interval", str(every)),
        *("--trainer.check_val_every_n_epoch", "null", "--trainer.limit_val_batches", "8"),
        *("--model.schedule.warmup", "20", *WIDTHS[kind], *further),
        *("--trainer.precision", "bf16-mixed"),  # half the time, with AMX
    )
    config = TOKENIZER if kind == "tokenizer" else GENERATOR
    return Training(name, config, options)


def trainings(runs: Path) -> dict[str, Training]:
    """All runs in their order."""
    small = str(runs / "tokenizer-64" / "export")
    from_small = ("--model.init_from", small)
    large = ("--model.tokenizer", str(runs / "tokenizer-256-resized" / "export"))
    generator = str(runs / "generator-64" / "export")
    size = ("--model.tokenizer.image_size", "64")
    found = [
        training("tokenizer", 32, "tokenizer-64"),
        training("tokenizer", 64, "tokenizer-256-resized", *size, *from_small),
        training("tokenizer", 64, "tokenizer-256-fresh", *size),
        training("generator", 32, "generator-64", "--model.tokenizer", small),
        training("generator", 64, "generator-256-resized", *large, "--model.init_from", generator),
        training("generator", 64, "generator-256-fresh", *large),
    ]
    return {one.name: one for one in found}


def row_of(kind: str, runs: Path, made: dict[str, Training]) -> dict[str, Any]:
    """Losses of the resized and of the fresh model, on the same batches."""
    row: dict[str, Any] = {"name": kind, "updates": UPDATES[kind]}
    train: dict[str, list[tuple[int, float]]] = {}
    for start in ("resized", "fresh"):
        one = made[f"{kind}-256-{start}"]
        columns = columns_of(one.folder(runs) / "metrics.csv", "")
        train[start] = columns["train/loss"]
        measured = "val/l1" if kind == "tokenizer" else "val/loss"
        row[start] = {
            "start": train[start][0][1],  # before the first step
            "train": [list(pair) for pair in smoothed(train[start], SHARE, UPDATES[kind])],
            "validation": [list(pair) for pair in columns[measured]],
            "measured": measured,
            "training": one.facts(runs),
        }
    pairs = list(zip(train["resized"], train["fresh"], strict=True))
    below = [ours[1] < theirs[1] for ours, theirs in pairs]
    row["updates below"] = sum(below)
    row["first update above"] = None if all(below) else below.index(False) + 1
    final = row["fresh"]["validation"][-1][1]
    reached = [update for update, value in row["resized"]["validation"] if value <= final]
    row["fresh end reached at"] = reached[0] if reached else None
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a kind of model."""
    lines = [
        "| 256 tokens | first batch, made from 64 / fresh | validation, made from 64 / fresh "
        "| batches with the lower loss "
        "| end of the fresh one is reached at |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["resized"]
        theirs = row["fresh"]
        reached = row["fresh end reached at"]
        lines.append(
            f"| {row['name']} | {ours['start']:.3f} / {theirs['start']:.3f} | {ours['measured']} "
            f"{ours['validation'][-1][1]:.4f} / {theirs['validation'][-1][1]:.4f} "
            f"| {row['updates below']} of {row['updates']} | {f'update {reached}' if reached else '-'} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """A panel a kind: training losses, smoothed, and validation as dots."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for place, row in enumerate(rows, start=1):
        panel = figure.add_subplot(1, len(rows), place)
        for color, start in enumerate(("resized", "fresh")):
            label = "made from 64 tokens" if start == "resized" else "fresh"
            updates, values = zip(*row[start]["train"], strict=True)
            panel.plot(updates, values, color=f"C{color}", label=label)
            panel.plot(1, row[start]["start"], "o", color=f"C{color}", markersize=4)
        panel.set_yscale("log")
        panel.set_xlabel("updates")
        panel.set_title(f"{row['name']} of 256 tokens: training loss", fontsize=9)
        panel.legend(fontsize=8)
    figure.savefig(PLOT, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Models of 256 tokens made from 64")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--runs", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--runs_at_once", type=int, default=99)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runs = arguments.runs.resolve()
    made = trainings(runs)
    left = arguments.runs_at_once
    for one in made.values():
        if not is_made(one, runs):
            if left == 0:
                break
            left -= 1
        one.make(runs, arguments.data.resolve())
    rows = []
    small = []
    for kind in UPDATES:
        if all(is_made(one, runs) for name, one in made.items() if name.startswith(kind)):
            rows.append(row_of(kind, runs, made))
            small.append(made[f"{kind}-64"].facts(runs))
    if rows:
        write_results(NAME, rows, small=small)
        plot(rows)
        print(table(rows))


def is_made(one: Training, runs: Path) -> bool:
    return (one.folder(runs) / "export" / "model.safetensors").exists()


if __name__ == "__main__":
    main()
