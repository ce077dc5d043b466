"""Tokenizers of 32 tokens of 512 codes, and others beside them, on Fashion-MNIST at 96,000 images.

    python -m benchmarks.studies.tokenizers --data DIR --extractor FILE [--runs DIR] [--only NAME ...]

Trains each (float32, one thread, at most 60 CPU-minutes), keeps its export in float16 in
benchmarks/studies/exports, measures that export by `evaluate.py tokens` on all test images with the
given network and with a second one that is trained here, and by `evaluate.py probe`; writes
benchmarks/results/studies/tokenizers.json and docs/pictures/tokenizers_by_prefix.png, and prints the
table of docs/tokenizers.md. What is there is not made again; what was interrupted goes on.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.steps import (
    EXPORTS,
    ROOT,
    Training,
    command,
    measured,
    read_results,
    small_export,
    write_results,
)

NAME = "tokenizers"
TEACHER = EXPORTS / "fmnist-vit.safetensors"
SECOND = EXPORTS / "fmnist-convnext.safetensors"
PLOT = ROOT / "docs" / "pictures" / "tokenizers_by_prefix.png"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
TOKENIZER = "--model.init_args.tokenizer.init_args"
VALIDATION = ("--trainer.val_check_interval", "500", "--trainer.limit_val_batches", "16")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
CONVNEXT = {"patch_size": 2}


def plain(config: str, name: str = "", *options: str) -> Training:
    """A run of a config that needs no other network; `name` is that of the config unless given."""
    file = f"configs/fashion_mnist/{config}.yaml"
    return Training(name or config, file, (*VALIDATION, *options))


def taught(config: str, name: str = "", *options: str, part: str = "teacher") -> Training:
    """A run whose `part` reads the small network that stands in for a published teacher."""
    weights = (f"{TOKENIZER}.{part}.init_args.weights", str(TEACHER))
    file = f"configs/fashion_mnist/{config}.yaml"
    return Training(name or config, file, (*VALIDATION, *weights, *options), teacher="fmnist-vit")


TRAININGS = (
    plain("titok"),
    plain("one_d_piece"),
    taught("retok"),
    taught("restok"),
    taught("hita", part="vision"),
    plain("flextok"),
    plain("var_vqvae"),
    plain("kl_f4"),
    # One change each: training on prefixes. TiTok is One-D-Piece without them.
    plain("one_d_piece", "one_d_piece_both", f"{TOKENIZER}.drop", "{cross_length: true}"),
    taught("retok", "retok_whole", f"{TOKENIZER}.inferred", "{nested_dropout: false}"),
    taught("restok", "restok_whole", f"{TOKENIZER}.drop", "0"),
)


def make_networks(data: Path) -> None:
    """The teacher of configs/fashion_mnist/retok.yaml's header, and the second evaluator."""
    chosen = (
        (TEACHER, "teacher", "vit_tiny_patch16_224", VIT, ("--recipe.epochs", "1")),
        (SECOND, "evaluator", "convnext_zepto_rms", CONVNEXT, ("--recipe.epochs", "4")),
    )
    for seed, (file, purpose, arch, options, recipe) in enumerate(chosen, start=7):
        if file.exists():
            continue
        command(
            "evaluate.py",
            *("extractor", "--purpose", purpose, *FASHION, str(data), "--data.batch_size", "128"),
            *("--architecture.arch", arch, "--architecture.name", file.stem),
            *("--architecture.options", json.dumps(options)),
            *("--recipe.seed", str(seed), *recipe, "--out", str(file)),
        )


def row_of(training: Training, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, keep and measure one tokenizer."""
    export = training.make(arguments.runs, arguments.data)
    kept = small_export(export, training.name)
    folder = training.folder(arguments.runs)
    of_tokens = measured(
        folder / "tokens.json",
        "evaluate.py",
        *("tokens", str(kept), "--extractor", str(arguments.extractor), str(SECOND)),
        *(*FASHION, str(arguments.data), "--prefix_count", str(arguments.prefix_images)),
        *("--batch_size", "250", "--cache", str(arguments.runs / ".cache")),
    )
    lengths = [point["tokens"] for point in of_tokens["tokens"].get("prefixes", [])]
    parts = [f"tokens:{length}" for length in lengths]
    probes = ["linear", "attentive"]
    if "usage by position" in of_tokens["tokens"]:
        probes.append("purity")
    of_probes = measured(
        folder / "probe.json",
        "evaluate.py",
        *("probe", str(kept), *FASHION, str(arguments.data), "--train_count", "10000"),
        *("--features", "latents", "tokens", *parts, "--probes", *probes),
        *("--protocol.pooling", "flat", "--batch_size", "250"),
    )
    return {
        "name": training.name,
        "export": kept.name,
        "training": training.facts(arguments.runs),
        "metrics": of_tokens["metrics"],
        "images": of_tokens["samples"]["images"],
        "tokens": of_tokens["tokens"],
        "probes": of_probes["metrics"],
        "measured at": of_tokens["code"]["commit"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a tokenizer."""
    distances = [name for name in rows[0]["metrics"] if name.startswith("rF")]
    titles = ("run", "layout", "PSNR", "SSIM", *distances, "usage", "linear probe of tokens")
    lines = [f"| {' | '.join((*titles, 'updates', 'samples', 'CPU-s'))} |"]
    lines.append("|---" * (len(titles) + 3) + "|")
    for row in rows:
        metrics = row["metrics"]
        usage = [f"{value:.0%}" for name, value in metrics.items() if name.startswith("usage")]
        cells = [row["name"], row["tokens"]["layout"]]
        cells += [f"{metrics['PSNR']:.2f}", f"{metrics['SSIM']:.3f}"]
        cells += [f"{metrics[name]:.2f}" for name in distances]
        cells += [", ".join(usage) or "-", f"{row['probes']['linear(tokens)']:.3f}"]
        for name in ("updates", "samples_seen", "cpu_seconds"):
            cells.append(f"{row['training'][name]:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(row: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    """Lengths of prefixes and a number of each; of "linear" the probe's accuracy."""
    points = row["tokens"].get("prefixes", [])
    lengths = [point["tokens"] for point in points]
    if name == "linear":
        return lengths, [row["probes"][f"linear(tokens:{length})"] for length in lengths]
    return lengths, [point[name] for point in points]


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """PSNR, the first network's distance and probe accuracy against the tokens decoded."""
    distance = next(name for name in rows[0]["metrics"] if name.startswith("rF"))
    figure = Figure(figsize=(12, 3.5))
    panels: Sequence[Axes] = figure.subplots(1, 3)
    for axes, name in zip(panels, ("PSNR", distance, "linear"), strict=True):
        for row in rows:
            lengths, values = curve(row, name)
            if lengths:
                axes.plot(lengths, values, "o-", markersize=3, label=row["name"])
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(name)
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=7)
    figure.savefig(PLOT, dpi=110, bbox_inches="tight")


def main(argv: Sequence[str] | None = None) -> None:
    """Rows of all tokenizers, or of those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=[t.name for t in TRAININGS])
    parser.add_argument("--prefix_images", type=int, default=2000, help="images for the prefixes")
    arguments = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_networks(arguments.data)
    rows = {row["name"]: row for row in read_results(NAME)["rows"]}
    for training in TRAININGS:
        if arguments.only is not None and training.name not in arguments.only:
            continue
        rows[training.name] = row_of(training, arguments)
        ordered = [rows[one.name] for one in TRAININGS if one.name in rows]
        write_results(NAME, ordered)
        plot(ordered)
        print(table(ordered), flush=True)


if __name__ == "__main__":
    main()
