"""Tokenizers of 32 tokens of 512 codes, and others beside them, on Fashion-MNIST at 96,000 images.

    python -m benchmarks.studies.tokenizers --data DIR --extractor FILE [--second FILE] [--only NAME ...]

Trains each (float32, one thread, at most 60 CPU-minutes), keeps its export in float16 in
benchmarks/studies/exports, measures that export by `evaluate.py tokens` on the test images, and
writes benchmarks/results/studies/tokenizers.json. What is there is not made again; what was
interrupted goes on. `--second` is another feature network, whose distances stand beside.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.steps import (
    EXPORTS,
    Training,
    command,
    measured,
    read_results,
    small_export,
    write_results,
)

NAME = "tokenizers"
TEACHER = EXPORTS / "fmnist-vit.safetensors"
TOKENIZER = "--model.init_args.tokenizer.init_args"
VALIDATION = ("--trainer.val_check_interval", "500", "--trainer.limit_val_batches", "16")


def taught(name: str, part: str = "teacher") -> Training:
    """A config whose `part` reads the teacher that stands in for a published one."""
    weights = (f"{TOKENIZER}.{part}.init_args.weights", str(TEACHER))
    config = f"configs/fashion_mnist/{name}.yaml"
    return Training(name, config, (*VALIDATION, *weights), teacher="fmnist-vit")


def plain(name: str) -> Training:
    """A config that needs no other network."""
    return Training(name, f"configs/fashion_mnist/{name}.yaml", VALIDATION)


TRAININGS = (
    plain("titok"),
    plain("one_d_piece"),
    taught("retok"),
    taught("restok"),
    taught("hita", part="vision"),
    plain("flextok"),
    plain("var_vqvae"),
    plain("kl_f4"),
)


def make_teacher(data: Path) -> None:
    """The small vision transformer of configs/fashion_mnist/retok.yaml's header."""
    if TEACHER.exists():
        return
    command(
        "evaluate.py",
        *("extractor", "--purpose", "teacher", "--data", "tessellar.data.FashionMNISTData"),
        *("--data.root", str(data), "--data.batch_size", "128"),
        *("--architecture.arch", "vit_tiny_patch16_224", "--architecture.name", "fmnist-vit"),
        *("--architecture.options", json.dumps(VIT_OPTIONS)),
        *("--recipe.seed", "7", "--recipe.epochs", "1", "--out", str(TEACHER)),
    )


VIT_OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


def row_of(training: Training, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, keep and measure one tokenizer."""
    export = training.make(arguments.runs, arguments.data)
    kept = small_export(export, training.name)
    networks = [str(file) for file in (arguments.extractor, arguments.second) if file is not None]
    names = "-".join(Path(file).stem for file in networks)
    record = measured(
        training.folder(arguments.runs) / f"tokens-{names}.json",
        "evaluate.py",
        *("tokens", str(kept), "--extractor", *networks),
        *("--data", "tessellar.data.FashionMNISTData", "--data.root", str(arguments.data)),
        *("--prefix_count", str(arguments.prefix_images), "--batch_size", "250"),
        *("--cache", str(arguments.runs / ".cache")),
    )
    return {
        "name": training.name,
        "export": kept.name,
        "training": training.facts(arguments.runs),
        "metrics": record["metrics"],
        "images": record["samples"]["images"],
        "tokens": record["tokens"],
        "measured at": record["code"]["commit"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Rows of all tokenizers, or of those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--second", type=Path, help="another feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=[t.name for t in TRAININGS])
    parser.add_argument("--prefix_images", type=int, default=2000, help="images for the prefixes")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_teacher(arguments.data)
    rows = {row["name"]: row for row in read_results(NAME)["rows"]}
    for training in TRAININGS:
        if arguments.only is not None and training.name not in arguments.only:
            continue
        rows[training.name] = row_of(training, arguments)
        ordered = [rows[t.name] for t in TRAININGS if t.name in rows]
        write_results(NAME, ordered)


if __name__ == "__main__":
    main()
