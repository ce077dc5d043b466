"""1D tokenizers with an order beside those without, on Fashion-MNIST: AliTok, Semanticist, TiTok, One-D-Piece, and the
generator that belongs to each, at equal training samples.

    python -m benchmarks.studies.ordered --data DIR --extractor FILE [--runs DIR] [--only NAME ...]

Trains each tokenizer (AliTok in its two stages, half of the samples each) and a generator on its tokens, one thread;
measures the tokenizer by `evaluate.py tokens` (PSNR, rFD, pFD where there are codes) and the generator by `evaluate.py
sweep`, whose guidance is chosen on other seeds than are reported; both with the given network and a second one. Writes
benchmarks/results/studies/ordered.json and prints the table of docs/tokenizers.md. What is there is not made again;
what was interrupted goes on.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.steps import (
    EXPORTS,
    Training,
    command,
    measured,
    read_results,
    write_results,
)

NAME = "ordered"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
SAMPLES = 32_000  # of a tokenizer
GENERATOR_SAMPLES = 32_000
BATCH = 64
RECONSTRUCTED = 2000  # test images
SWAPPED = 1000  # test images of pFD
TUNING = 300  # images at each guidance, of seeds 0 to 299
REPORTED = 2000  # images at the chosen one, of the seeds behind those
SCALES = (1.25, 2.0, 3.0)
TOKENIZER = "--model.init_args.tokenizer.init_args"
SHORT = (
    *("--trainer.precision", "bf16-mixed", "--data.init_args.batch_size", str(BATCH)),
    *("--trainer.limit_val_batches", "4", "--trainer.check_val_every_n_epoch", "null"),
)


class System(NamedTuple):
    """A tokenizer's config with its stages (options of each; a later one starts from the one before),
    and its generator's config with options, and whether codes restart over the run.
    """

    name: str
    tokenizer: str
    generator: str
    stages: tuple[tuple[str, ...], ...] = ((),)
    restarts: bool = False


SYSTEMS = (
    System("TiTok", "titok", "generator", restarts=True),
    System("One-D-Piece", "one_d_piece", "generator", restarts=True),
    System(
        "AliTok",
        "alitok",
        "alitok_ar",
        stages=((f"{TOKENIZER}.stage", "causal"), (f"{TOKENIZER}.stage", "bidirectional")),
    ),
    System("Semanticist", "semanticist", "semanticist_ar"),
)


def steps_of(samples: int) -> tuple[str, ...]:
    """A run's length; it is validated at the end."""
    updates = str(samples // BATCH)
    return ("--trainer.max_steps", updates, "--trainer.val_check_interval", updates)


def tokenizers(system: System, runs: Path, samples: int) -> list[Training]:
    """The runs of a tokenizer, a stage each."""
    made: list[Training] = []
    for number, options in enumerate(system.stages):
        words = [*SHORT, *steps_of(samples // len(system.stages)), *options]
        if system.restarts:
            until = str(7 * (samples // BATCH) // 10)
            words += [f"{TOKENIZER}.quantizer.init_args.restart_until", until]
        if made:
            words += ["--model.init_args.init_from", str(made[-1].folder(runs) / "export")]
        file = f"configs/fashion_mnist/{system.tokenizer}.yaml"
        made.append(Training(f"{system.tokenizer}-{number}", file, tuple(words)))
    return made


def generator(system: System, export: Path, samples: int) -> Training:
    """The run of a generator on the tokens of an export."""
    words = (*SHORT, *steps_of(samples), "--model.init_args.tokenizer", str(export))
    file = f"configs/fashion_mnist/{system.generator}.yaml"
    return Training(f"{system.tokenizer}-generator", file, words)


def row_of(system: System, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one system."""
    runs = given.runs
    stages = tokenizers(system, runs, given.samples)
    for stage in stages:
        export = stage.make(runs, given.data)
    drawn = generator(system, export, given.generator_samples)
    made = drawn.make(runs, given.data)
    networks = (str(given.extractor), str(SECOND))
    common = (*FASHION, str(given.data), "--batch_size", "250", "--cache", str(runs / ".cache"))
    of_tokens = measured(
        stages[-1].folder(runs) / "tokens.json",
        "evaluate.py",
        *("tokens", str(export), "--extractor", *networks, "--count", str(RECONSTRUCTED)),
        *("--prefix_count", str(SWAPPED), "--alpha", "0.5", "1", "--delta", "8", "32", *common),
    )
    swept_in = drawn.folder(runs) / "sweep"
    if not (swept_in / "sweep.json").exists():
        command(
            "evaluate.py",
            *("sweep", str(made), "--extractor", *networks, "--metrics", "[fd,accuracy]"),
            *("--count", str(TUNING), "--final_count", str(REPORTED), "--out", str(swept_in)),
            *("--axes", json.dumps({"guidance.scale": list(SCALES)}), *common),
        )
    swept = json.loads((swept_in / "sweep.json").read_text(encoding="utf-8"))
    return {
        "name": system.name,
        "tokenizer": [stage.facts(runs) for stage in stages],
        "generator": drawn.facts(runs),
        "metrics": of_tokens["metrics"],
        "tokens": of_tokens["tokens"],
        "guidance": swept["chosen"]["guidance.scale"],
        "samples": swept["final"]["metrics"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a system."""
    distances = [name for name in rows[0]["samples"] if name.startswith("FD(")]
    titles = ["system", "layout", "PSNR", *[f"r{name}" for name in distances], "pFD", "guidance"]
    titles += [f"generator's {name}" for name in distances]
    titles += ["accuracy", "CPU-s of the tokenizer", "of the generator"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"], row["tokens"]["layout"], f"{row['metrics']['PSNR']:.2f}"]
        cells += [f"{row['metrics'][f'r{name}']:.2f}" for name in distances]
        swaps = [cell[f"r{distances[0]}"] for cell in row["tokens"].get("swaps", [])]
        cells.append(f"{sum(swaps) / len(swaps):.1f}" if swaps else "-")
        cells.append(f"{row['guidance']:g}")
        cells += [f"{row['samples'][name]:.2f}" for name in distances]
        accuracy = next(value for name, value in row["samples"].items() if "accuracy" in name)
        seconds = sum(stage["cpu_seconds"] for stage in row["tokenizer"])
        cells += [f"{accuracy:.2f}", f"{seconds:,.0f}", f"{row['generator']['cpu_seconds']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Rows of all systems, or of those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/ordered"))
    parser.add_argument("--only", nargs="+", choices=[system.name for system in SYSTEMS])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a tokenizer")
    parser.add_argument("--generator_samples", type=int, default=GENERATOR_SAMPLES)
    given = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(given, name, getattr(given, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for system in SYSTEMS:
        if given.only is not None and system.name not in given.only:
            continue
        row = row_of(system, given)
        # Read now: another process may have measured other systems meanwhile.
        rows = {one["name"]: one for one in read_results(NAME)["rows"]}
        rows[system.name] = row
        ordered = [rows[one.name] for one in SYSTEMS if one.name in rows]
        facts = {"samples": given.samples, "generator samples": given.generator_samples}
        write_results(NAME, ordered, **facts, tuning=TUNING, reported=REPORTED)
        print(table(ordered), flush=True)


if __name__ == "__main__":
    main()
