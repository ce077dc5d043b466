"""Test-time search over ordered tokens and over a grid's, on Fashion-MNIST: what more verifier calls bring.

    python -m benchmarks.studies.search --data DIR --extractor FILE [--runs DIR] [--only NAME ...]

One-D-Piece's 32 ordered tokens and ViT-VQ's 64 of a grid, each with a LlamaGen, trained at equal samples (the runs of
benchmarks/studies/ordered.py are taken where they lie in `--runs`). A classifier that is trained here (an epoch;
purpose: teacher) chooses among candidates of best-of-N, beams and lookahead; two networks that chose nothing measure
what was kept. Writes benchmarks/results/studies/search.json and docs/pictures/search.png, prints the table of
docs/search.md. What is there is not made again.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.studies.ordered import (
    FASHION,
    GENERATOR_SAMPLES,
    SAMPLES,
    SECOND,
    System,
    generator,
    tokenizers,
)
from benchmarks.studies.steps import ROOT, command, measured, read_results, write_results

NAME = "search"
PLOT = ROOT / "docs" / "pictures" / "search.png"
IMAGES = 200  # of each search, 20 a class
GUIDANCE = 1.5
TEACHER = "fmnist-judge"  # which chooses and never measures
KINDS = {
    "ordered": System("One-D-Piece", "one_d_piece", "generator", restarts=True),
    "grid": System("ViT-VQ", "tokenizer", "generator", restarts=True),
}


class Search(NamedTuple):
    """A search by its class, and its options."""

    name: str
    class_name: str
    options: dict[str, Any]


def beam(class_name: str, width: int, candidates: int, schedule: dict[str, Any]) -> Search:
    """Its options; `schedule` is a class's name and its fields."""
    options = {"width": width, "candidates": candidates, **schedule}
    return Search(f"{class_name} {width} x {candidates}", class_name, options)


# Lengths at which the ordered tokenizer was trained; quarters of the grid.
LENGTHS: dict[str, dict[str, Any]] = {
    "ordered": {"schedule": "Geometric"},
    "grid": {"schedule": "Even", "schedule.every": 16},
}


def searches_of(kind: str) -> list[Search]:
    """Best of N, beams and lookahead by growing cost."""
    found = [Search(f"best of {count}", "BestOfN", {"count": count}) for count in (1, 2, 4, 8, 16)]
    found += [beam("Beam", width, 4, LENGTHS[kind]) for width in (1, 3)]
    found += [beam("Lookahead", width, 4, LENGTHS[kind]) for width in (1, 3)]
    return found


def judge(given: argparse.Namespace) -> Path:
    """The classifier that chooses."""
    file: Path = given.runs / f"{TEACHER}.safetensors"
    if not file.exists():
        words = ["extractor", "--purpose", "teacher", *FASHION, str(given.data)]
        words += ["--data.batch_size", "128", "--architecture.arch", "test_resnet"]
        words += ["--architecture.name", TEACHER, "--recipe.epochs", "1", "--out", str(file)]
        command("evaluate.py", *words)
    return file


def trained(kind: str, given: argparse.Namespace) -> Path:
    """The export of a kind's generator, with its tokenizer."""
    system = KINDS[kind]
    stages = tokenizers(system, given.runs, given.samples)
    for stage in stages:
        export = stage.make(given.runs, given.data)
    last = generator(system, export, given.generator_samples)
    return last.make(given.runs, given.data)


def row_of(kind: str, search: Search, given: argparse.Namespace) -> dict[str, Any]:
    """Searched images: what the classifier says of them, and what others do."""
    export = trained(kind, given)
    out = given.runs / "searched" / f"{kind} {search.name}".replace(" ", "_")
    if not (out / "samples.json").exists():
        words = [str(export), "--out", str(out), "--count", str(given.images)]
        words += ["--guidance", "Constant", "--guidance.scale", str(GUIDANCE)]
        words += ["--search", search.class_name, "--search.verifier", "Classifier"]
        words += ["--search.verifier.weights", str(judge(given))]
        for name, value in search.options.items():
            words += [f"--search.{name}", str(value)]
        command("sample.py", *words)
    record = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    found = measured(
        out.with_suffix(".json"),
        "evaluate.py",
        *("samples", str(out), "--reference", "train", *FASHION, str(given.data)),
        *("--extractor", str(given.extractor), str(SECOND), "--metrics", "[fd,accuracy]"),
        *("--batch_size", "250", "--cache", str(given.runs / ".cache")),
    )
    return {
        "name": f"{kind}: {search.name}",
        "kind": kind,
        "search": search.class_name,
        "options": search.options,
        "calls": record["verifier_calls"] / given.images,
        "score": mean(record["scores"]),
        "metrics": found["metrics"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a search."""
    names = list(rows[0]["metrics"])
    titles = [
        "tokens: search",
        "verifier calls an image",
        "verifier's mean log-probability",
        *names,
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['calls']:.0f}", f"{row['score']:.4f}"]
        cells += [f"{row['metrics'][name]:.3f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """The verifier's score and the distance that others measure, against calls."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    distance = next(name for name in rows[0]["metrics"] if name.startswith("FD("))
    panels = figure.subplots(1, 2)
    lines = sorted({(row["kind"], row["search"]) for row in rows})
    for kind, search in lines:
        of_line = [row for row in rows if (row["kind"], row["search"]) == (kind, search)]
        calls = [row["calls"] for row in of_line]
        color = "C0" if kind == "ordered" else "C1"
        style = {"BestOfN": "o-", "Beam": "s--", "Lookahead": "^:"}[search]
        label = f"{kind}, {search}"
        panels[0].plot(calls, [row["score"] for row in of_line], style, color=color, label=label)
        distances = [row["metrics"][distance] for row in of_line]
        panels[1].plot(calls, distances, style, color=color, label=label)
    panels[0].set_ylabel("log-probability of the class, by the verifier")
    panels[1].set_ylabel(f"{distance}, which chose nothing")
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("verifier calls an image")
    panels[0].legend(fontsize=8)
    figure.savefig(PLOT, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Rows of both kinds, or of those named by `--only`."""
    parser = argparse.ArgumentParser(description="Search over ordered and over grid tokens")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/ordered"))
    parser.add_argument("--only", nargs="+", choices=list(KINDS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a tokenizer")
    parser.add_argument("--generator_samples", type=int, default=GENERATOR_SAMPLES)
    parser.add_argument("--images", type=int, default=IMAGES, help="of each search")
    given = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(given, name, getattr(given, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    order = [f"{kind}: {search.name}" for kind in KINDS for search in searches_of(kind)]
    for kind in given.only or KINDS:
        for search in searches_of(kind):
            row = row_of(kind, search, given)
            # Read now: another process may have measured the other kind meanwhile.
            rows = {one["name"]: one for one in read_results(NAME)["rows"]}
            rows[row["name"]] = row
            ordered = [rows[name] for name in order if name in rows]
            write_results(NAME, ordered, images=given.images, guidance=GUIDANCE)
            plot(ordered)
            print(table(ordered), flush=True)


if __name__ == "__main__":
    main()
