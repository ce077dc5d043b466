"""Fewer evaluations on a longer-trained generator of 256 tokens, on Fashion-MNIST: exact decoding, approximate
decoding, FLASH's drafter, and LPD's learned parallelism.

    python -m benchmarks.studies.parallel --data DIR --extractor FILE [--runs DIR] [--only ROW ...] [--old EXPORT]

Trains a ViT-VQ of 256 tokens, a LlamaGen, an LPD on as many samples, and a drafter, one thread each; chooses guidance
by `evaluate.py sweep` on tuning seeds (the LlamaGen's with plain decoding, LPD's at each number of steps); measures
every row by benchmarks/tradeoff.py, with the given network and a second one; then the exact row of fewest evaluations
on an older model and on this one, each beside its overlaps by benchmarks/dependence.py. The older model is a checkpoint
of the same run, as many samples in as docs/decoding.md's model of 256 tokens had, unless `--old` names another;
`--retrain_old` trains that model again. Writes benchmarks/results/studies/parallel.json and docs/pictures/parallel.png
and prints the tables of docs/decoding.md. What is there is not made again; what was interrupted goes on.
"""

import argparse
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.studies.steps import (
    EXPORTS,
    ROOT,
    Training,
    command,
    measured,
    read_results,
    write_results,
)
from benchmarks.tradeoff import distances_of, evaluations_of, plot, points_of, table
from tessellar.errors import UserError

NAME = "parallel"
PLOT = ROOT / "docs" / "pictures" / "parallel.png"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
BATCH = 32
TOKENIZER_SAMPLES = 25_600
SAMPLES = 44_800  # of the LlamaGen, and of LPD, which takes twice as long
WIDTH = 192  # of both, as of docs/decoding.md's model
DEPTH = 6
HEAD_DIM = 32
EARLY = 25_600  # samples of the checkpoint that stands for an older model
DRAFTER_SAMPLES = 12_800
DRAFTS = 5
TUNING = 400  # images at each guidance, of seeds 0 to 399
REPORTED = 2000  # images at the chosen one, of the seeds behind those
SCALES = (1.5, 2.0, 2.5, 3.0)
IMAGES = 500  # of each seed of a row
SEEDS = 3
TIMED = 20  # images of a row at batch 1
AT_ONCE = 125  # images; siblings hold the caches of several branches
PROBED = 20  # images whose overlaps are taken

#: Names of rows of benchmarks/tradeoff.py.
FLASH = f"flash {DRAFTS} drafts"
EXACT = (
    "plain",
    "sjd 16 none",
    "sjd 32 maximal uniform",
    "sjd 64 gumbel",
    "siblings 16 x 2",
    FLASH,
)
APPROXIMATE = (
    "gsd 16 G 14 p 0.15",
    "gsd 64 maximal",
    "sjd++ 16 t 0.5",
    "zipar 8",
    "zipar 4",
    "pjd 16 c 0.5",
)
LEARNED = ("steps 8", "steps 12", "steps 20")  # of LPD
LIMITS = ("old model", "new model")
ROWS = (*EXACT, *APPROXIMATE, *LEARNED, *LIMITS)

TOKENIZER = "--model.init_args.tokenizer.init_args"
GENERATOR = "--model.init_args.generator.init_args"


def length_of(samples: int) -> tuple[str, ...]:
    """A run's length; it is validated at the end."""
    updates = str(samples // BATCH)
    return (
        *("--trainer.precision", "bf16-mixed", "--data.init_args.batch_size", str(BATCH)),
        *("--trainer.max_steps", updates, "--trainer.val_check_interval", updates),
        *("--trainer.check_val_every_n_epoch", "null", "--trainer.limit_val_batches", "16"),
    )


def config(name: str) -> str:
    return f"configs/fashion_mnist/{name}.yaml"


def tokenizer(given: argparse.Namespace) -> Training:
    """The ViT-VQ of patches of two pixels."""
    restarts = str(7 * (given.tokenizer_samples // BATCH) // 10)
    words = (
        *length_of(given.tokenizer_samples),
        *(f"{TOKENIZER}.patch_size", "2"),
        *(f"{TOKENIZER}.quantizer.init_args.restart_until", restarts),
    )
    return Training("tokenizer", config("tokenizer"), words)


def on_tokens(given: argparse.Namespace, name: str, samples: int, *words: str) -> Training:
    """A run of the config `name` on the tokenizer's tokens."""
    tokens = str(tokenizer(given).folder(given.runs) / "export")
    sizes = (
        *(f"{GENERATOR}.width", str(given.width), f"{GENERATOR}.depth", str(given.depth)),
        *(f"{GENERATOR}.num_heads", str(given.width // HEAD_DIM)),
    )
    options = (*length_of(samples), "--model.init_args.tokenizer", tokens, *sizes, *words)
    return Training(name, config(name), options)


def llamagen(given: argparse.Namespace) -> Training:
    """The generator; checkpoints of the older model's age stay."""
    return on_tokens(given, "generator", given.samples, "--keep_every", str(given.early // BATCH))


def lpd(given: argparse.Namespace) -> Training:
    """As many samples of the same tokens."""
    return on_tokens(given, "lpd", given.samples)


def drafter(given: argparse.Namespace, scale: float) -> Training:
    """One block that learns the laws of the LlamaGen at the guidance that it will draft for."""
    target = str(llamagen(given).folder(given.runs) / "export")
    words = (
        *("--model.init_args.target", target, f"{GENERATOR}.depth", "1"),
        *(f"{GENERATOR}.drafts", str(DRAFTS), f"{GENERATOR}.guidance", str(scale)),
    )
    return on_tokens(given, "flash", given.drafter_samples, *words)


def common(given: argparse.Namespace) -> tuple[str, ...]:
    """What commands of evaluate.py share."""
    networks = (str(given.extractor), str(SECOND))
    return (
        *("--extractor", *networks, *FASHION, str(given.data), "--batch_size", "250"),
        *("--cache", str(given.runs / ".cache")),
    )


def swept(given: argparse.Namespace, model: Training, steps: int | None = None) -> dict[str, Any]:
    """The guidance of a generator, chosen on tuning seeds, and its numbers on others; drawn in
    `steps` steps.
    """
    suffix = "" if steps is None else f"-{steps}"
    folder = given.runs / "sweeps" / f"{model.name}{suffix}"
    export = model.make(given.runs, given.data)
    if not (folder / "sweep.json").exists():
        command(
            "evaluate.py",
            *("sweep", str(export), "--metrics", "[fd,accuracy]", "--precision", "bf16"),
            *("--count", str(given.tuning), "--final_count", str(given.reported)),
            *(() if steps is None else (f"--algorithm.steps={steps}",)),
            *("--axes", json.dumps({"guidance.scale": list(SCALES)}), "--out", str(folder)),
            *common(given),
        )
    record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return {
        "name": f"{model.name}{suffix}",
        "training": model.facts(given.runs),
        "guidance": record["chosen"]["guidance.scale"],
        "tuning": [{**point["values"], **point["metrics"]} for point in record["points"]],
        "metrics": record["final"]["metrics"],
    }


def decoded(
    given: argparse.Namespace, row: str, export: Path, folder: str, scale: float, *words: str
) -> dict[str, Any]:
    """A row of benchmarks/tradeoff.py."""
    out = given.runs / folder / re.sub(r"\W+", "-", row)
    path = out / "results.json"
    if not path.exists():
        command(
            "benchmarks/tradeoff.py",
            *(str(export), "--rows", f"^{re.escape(row)}$", "--guidance", str(scale), "--bf16"),
            *("--timed", str(given.timed), "--out", str(out), *words),
        )
    if not path.exists():
        raise UserError(f"benchmarks/tradeoff.py measured no row {row!r}: see what it printed")
    (found,) = json.loads(path.read_text(encoding="utf-8"))
    return found


def floor_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the tokenizer's reconstructions leave to be reached, and what it cost."""
    made = tokenizer(given)
    folder = made.folder(given.runs)
    record = measured(
        folder / "reconstruction.json",
        "evaluate.py",
        *("model", str(folder / "export"), "--metrics", "[fd,paired]"),
        *("--count", str(given.reported), *common(given)),
    )
    return {"training": made.facts(given.runs), "metrics": record["metrics"]}


def measured_row(given: argparse.Namespace, row: str) -> dict[str, Any]:
    """A row of the table, with what had to be trained for it."""
    tokenizer(given).make(given.runs, given.data)
    words = [
        *("--data", str(given.data), "--extractor", str(given.extractor), str(SECOND)),
        *("--images", str(given.images), "--seeds", str(SEEDS), "--batch-size", str(AT_ONCE)),
        *("--cache", str(given.runs / ".cache")),
    ]
    if row in LEARNED:
        model = lpd(given)
        tuned = swept(given, model, int(row.split()[1]))
    else:
        model = llamagen(given)
        tuned = swept(given, model)
    scale = tuned["guidance"]
    trained = {}
    if row == "plain":
        trained = {"tokenizer": floor_of(given)}
    if row == FLASH:
        drafting = drafter(given, scale)
        words += ["--drafter", str(drafting.make(given.runs, given.data))]
        trained = {"drafter": drafting.facts(given.runs)}
    export = model.folder(given.runs) / "export"
    found = decoded(given, row, export, "tradeoff", scale, *words)
    return {**found, "guidance": scale, "model": tuned, **trained}


def older(given: argparse.Namespace) -> tuple[str, Path]:
    """What the older model is, and where."""
    if given.old is not None:
        return f"old: {given.old}", given.old
    if given.retrain_old:
        model = replace(on_tokens(given, "generator", given.early), name="old-generator")
        return f"old: {given.early:,} samples", model.make(given.runs, given.data)
    update = given.early // BATCH
    folder = llamagen(given).folder(given.runs) / "checkpoints"
    what = f"old: this run's checkpoint at {given.early:,} samples"
    return what, folder / f"update_{update:08d}.ckpt"


def limit_of(given: argparse.Namespace, row: str) -> dict[str, Any]:
    """Evaluations of the best exact row on the older or the new model, and that model's overlaps."""
    tokenizer(given).make(given.runs, given.data)
    scale = swept(given, llamagen(given))["guidance"]
    best = best_exact(read_results(NAME)["rows"])
    if row == "old model":
        what, model = older(given)
    else:
        what = f"new: {given.samples:,} samples"
        model = llamagen(given).folder(given.runs) / "export"
    folder = row.replace(" ", "-")
    overlaps = measured(
        given.runs / f"{folder}-dependence.json",
        "benchmarks/dependence.py",
        *(str(model), "--guidance", str(scale), "--images", str(given.probed), "--bf16"),
    )
    samples = measured(
        given.runs / f"{folder}-samples.json",
        "evaluate.py",
        *("model", str(model), "--metrics", "[fd,accuracy]", "--precision", "bf16"),
        *("--reference", "train", "--guidance", "Constant", "--guidance.scale", str(scale)),
        *("--count", str(given.reported), "--seed", str(given.tuning), *common(given)),
    )
    found = decoded(given, best, model, folder, scale, "--images", "0")
    plain = decoded(given, "plain", model, folder, scale, "--images", "0")
    return {
        "name": row,
        "what": what,
        "guidance": scale,
        "metrics": samples["metrics"],
        "dependence": overlaps,
        "best exact": best,
        "evaluations": evaluations_of(found),
        "fewer by": evaluations_of(plain) / evaluations_of(found),
    }


def best_exact(rows: Sequence[dict[str, Any]]) -> str:
    """Name of the exact row of fewest evaluations that works with any model; FLASH's drafter was
    trained for one. Raises UserError where exact rows were not measured yet.
    """
    known = {row["name"]: row for row in rows if row["name"] in EXACT}
    missing = [name for name in EXACT if name not in known and name != FLASH]
    if missing:
        raise UserError(f"measure all exact rows first; missing: {', '.join(missing)}")
    alone = [name for name in known if name != FLASH]
    return min(alone, key=lambda name: evaluations_of(known[name]))


def models_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the generators at their guidance."""
    models = {row["model"]["name"]: row["model"] for row in rows if "model" in row}
    names = list(dict.fromkeys(name for model in models.values() for name in model["metrics"]))
    lines = [f"| model | samples | CPU-seconds | guidance | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for name, model in models.items():
        training = model["training"]
        cells = [name, f"{training['samples_seen']:,}", f"{training['cpu_seconds']:,.0f}"]
        cells += [f"{model['guidance']:g}"]
        cells += [f"{model['metrics'][metric]:.3g}" for metric in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def limits_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what limits exact decoding of the older and of the new model."""
    names = [name for name in rows[0]["metrics"] if name.startswith("F")]
    counts = list(rows[0]["dependence"]["overlaps"])
    titles = ["model", *names, "nats a token", f"overlap after {', '.join(counts)} new tokens"]
    titles += ["best exact", "evaluations", "fewer by"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["what"], *[f"{row['metrics'][name]:.2f}" for name in names]]
        cells.append(f"{row['dependence']['entropy']:.2f}")
        cells.append(", ".join(f"{row['dependence']['overlaps'][count]:.2f}" for count in counts))
        cells += [row["best exact"], f"{row['evaluations']:.1f}", f"{row['fewer by']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Tables and the picture of what was measured."""
    decoding = [row for row in rows if row["name"] not in LIMITS]
    limits = [row for row in rows if row["name"] in LIMITS]
    if decoding:
        print(models_table(decoding), table(decoding), sep="\n\n", flush=True)
        (first, *_) = distances_of(decoding)
        plot(points_of(decoding, first), first, PLOT)
    if limits:
        print(limits_table(limits), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all rows, or those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/parallel"))
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--old", type=Path, help="export of an older model of the same layout")
    parser.add_argument(
        "--retrain_old", action="store_true", help="train one on as many samples as --early"
    )
    sizes = {
        "tokenizer_samples": (TOKENIZER_SAMPLES, "of the tokenizer's training"),
        "samples": (SAMPLES, "of the LlamaGen's, and of LPD's"),
        "early": (EARLY, "of the checkpoint that is the older model"),
        "width": (WIDTH, "of both generators"),
        "depth": (DEPTH, "of both generators"),
        "drafter_samples": (DRAFTER_SAMPLES, "of the drafter's training"),
        "tuning": (TUNING, "images at each guidance"),
        "reported": (REPORTED, "images at the chosen one"),
        "images": (IMAGES, "of each seed of a row"),
        "timed": (TIMED, "images of a row at batch 1"),
        "probed": (PROBED, "images whose overlaps are taken"),
    }
    for name, (default, what) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    given = parser.parse_args(argv)
    for name in ("data", "extractor", "runs", "old"):
        if getattr(given, name) is not None:
            setattr(given, name, getattr(given, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ROWS:
        if given.only is not None and name not in given.only:
            continue
        row = limit_of(given, name) if name in LIMITS else measured_row(given, name)
        # Read now: another process may have measured other rows meanwhile.
        rows = {one["name"]: one for one in read_results(NAME)["rows"]}
        rows[name] = row
        ordered = [rows[one] for one in ROWS if one in rows]
        facts = {size: getattr(given, size) for size in sizes}
        write_results(NAME, ordered, **facts, seeds=SEEDS)
        show(ordered)


if __name__ == "__main__":
    main()
