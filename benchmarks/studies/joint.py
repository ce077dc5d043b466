"""Tokenizers for their generators, on Fashion-MNIST: joint training against two stages at equal compute,
latents that are disturbed in training against none.

    python -m benchmarks.studies.joint --data DIR --extractor FILE [--runs DIR] [--only ARM ...] [--seed N]

Every arm has the same ViT-VQ of 64 tokens of 512 codes (IBQ) and the same LlamaGen. Two stages are
UPDATES of each; a joint update passes tokenizer and generator once and the decoder twice, so joint
training has JOINT_UPDATES of them, about as many CPU-seconds, which the table says. Measured: rFD and
PSNR, pFD (a share of the tokens swapped for near codes), and the distance of the generator's samples.
Writes benchmarks/results/studies/joint.json and docs/pictures/joint.png, prints the table of docs/joint.md.
What is there is not made again.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.studies.steps import ROOT, Training, measured, read_results, write_results
from tessellar.checkpoints.export import export_tokenizer
from tessellar.pipeline import load_generator

NAME = "joint"
PLOT = ROOT / "docs" / "pictures" / "joint.png"
#: Of the tokenizer, then of the generator.
UPDATES = (1200, 600)
JOINT_UPDATES = 700
BATCH = 64
SWAPPED = 1000  # test images whose tokens are swapped for pFD
ALONE = "tokenizer"  # folder in a joint run with the export of its tokenizer
RAMP = (100, 100)  # first update of a joint loss, and over how many it grows
CORRUPTION = "tessellar.training.methods.latent_corruption"
QUANTIZER = {
    "class_path": "tessellar.tokenizers.quantizers.ibq.IBQ",
    "init_args": {"vocab_size": 512, "dim": 16},
}
MASK = {"class_path": f"{CORRUPTION}.Mask"}


def noise(gamma: float) -> dict[str, Any]:
    """l-DeTok's noise at a strength; its own is 3."""
    return {
        "class_path": f"{CORRUPTION}.Interpolate",
        "init_args": {"gamma": gamma, "relative": True},
    }


def swap(delta: int) -> dict[str, Any]:
    """RobustTok's settings with so many near codes; its 100 are a fortieth of its 4,096 codes."""
    return {
        "class_path": f"{CORRUPTION}.Swap",
        "init_args": {"alpha": 1.0, "beta": 0.1, "delta": delta},
    }


@dataclass(frozen=True)
class Arm:
    """What disturbs the latents in the tokenizer's training, and for how many of its last updates the
    decoder alone is trained, on clean ones; or one `joint` run, `anew` with another generator on its
    tokenizer, which then stays.
    """

    corruptions: tuple[dict[str, Any], ...] = ()
    clean: int = 0
    joint: bool = False
    anew: bool = False


ARMS = {
    "two stages": Arm(),
    "joint": Arm(joint=True),
    "joint, then a generator": Arm(joint=True, anew=True),
    "perturbed": Arm((swap(100),)),
    "perturbed, 12 codes": Arm((swap(12),)),
    "denoised": Arm((MASK, noise(3.0))),
    "denoised, noise of 0.5": Arm((MASK, noise(0.5))),
    # As l-DeTok's paper ends.
    "denoised, then the decoder": Arm((MASK, noise(3.0)), clean=300),
}
TOKENIZER = (
    *("--model.tokenizer.quantizer", json.dumps(QUANTIZER)),
    *("--model.tokenizer.width", "96", "--model.tokenizer.decoder_depth", "3"),
)
GENERATOR = (
    *("--model.generator.width", "128", "--model.generator.depth", "4"),
    *("--model.generator.num_heads", "4", "--model.generator.ffn_multiple_of", "64"),
    *("--model.generator.zero_init_residual", "true"),
)
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")


def training(
    name: str, config: str, arguments: argparse.Namespace, updates: int, *options: str
) -> Training:
    """A run of `updates`, validated at its end."""
    every = (
        *("--trainer.max_steps", str(updates), "--trainer.val_check_interval", str(updates)),
        *("--trainer.check_val_every_n_epoch", "null", "--trainer.limit_val_batches", "16"),
        *("--data.batch_size", str(BATCH), "--model.schedule.warmup", "50"),
        *("--trainer.precision", "bf16-mixed", "--seed_everything", str(arguments.seed)),
    )
    file = f"configs/fashion_mnist/{config}.yaml"
    return Training(f"{name}-{arguments.seed}", file, (*every, *options))


def trainings(name: str, arguments: argparse.Namespace) -> list[Training]:
    """The runs of an arm in their order; the last one's export holds both models."""
    arm = ARMS[name]
    name = name.replace(",", "").replace(" ", "_")
    of_tokenizer, of_generator = UPDATES
    if arm.joint:
        options = ["--ema", "null"]
        for loss in ("likelihood", "prediction"):
            for key, value in zip(("start", "warmup"), RAMP, strict=True):
                options += [f"--model.{loss}.{key}", str(value)]
        words = (*TOKENIZER, *GENERATOR, *options)
        made = [training("joint", "joint", arguments, JOINT_UPDATES, *words)]
        if not arm.anew:
            return made
        alone = made[-1].folder(arguments.runs) / ALONE
        words = (*GENERATOR, "--model.tokenizer", str(alone))
        return [*made, training(name, "generator", arguments, of_generator, *words)]
    corruptions = ("--model.corruptions", json.dumps(arm.corruptions)) if arm.corruptions else ()
    updates = of_tokenizer - arm.clean
    words = (*TOKENIZER, *corruptions)
    made = [training(f"{name}-tokenizer", "tokenizer", arguments, updates, *words)]
    if arm.clean:
        start = str(made[-1].folder(arguments.runs) / "export")
        words = (*TOKENIZER, "--model.decoder_only", "true", "--model.init_from", start)
        made.append(training(f"{name}-decoder", "tokenizer", arguments, arm.clean, *words))
    words = (*GENERATOR, "--model.tokenizer", str(made[-1].folder(arguments.runs) / "export"))
    return [*made, training(f"{name}-generator", "generator", arguments, of_generator, *words)]


def row_of(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one arm."""
    made = trainings(arm, arguments)
    for one in made:
        export = one.make(arguments.runs, arguments.data)
        alone = one.folder(arguments.runs) / ALONE
        if ARMS[arm].anew and not alone.exists():
            export_tokenizer(load_generator(str(export)).tokenizer, alone)
    folder = made[-1].folder(arguments.runs)
    common = (
        *("--extractor", str(arguments.extractor), *FASHION, str(arguments.data)),
        *("--batch_size", "250", "--cache", str(arguments.runs / ".cache")),
    )
    of_tokens = measured(
        folder / "tokens.json",
        "evaluate.py",
        *("tokens", str(export), "--prefix_count", str(SWAPPED)),
        *("--alpha", "0.2", "--delta", "100", *common),
    )
    of_samples = measured(
        folder / "samples.json",
        "evaluate.py",
        *("model", str(export), "--reference", "train", "--count", str(arguments.images)),
        *("--guidance", "Constant", "--guidance.scale", "1.5", *common),
    )
    facts = [one.facts(arguments.runs) for one in made]
    return {
        "name": arm,
        "seed": arguments.seed,
        "updates": [fact["updates"] for fact in facts],
        "cpu_seconds": round(sum(fact["cpu_seconds"] for fact in facts), 1),
        "images": arguments.images,
        "reconstructions": of_tokens["metrics"],
        "tokens": of_tokens["tokens"],
        "samples": of_samples["metrics"],
        "commit": facts[-1]["commit"],
    }


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What the table shows, by its titles."""
    found = {}
    for name, value in row["reconstructions"].items():
        if name.startswith(("rFD", "pFD", "PSNR")):
            found[name] = value
    for name, value in row["tokens"].items():
        if name.startswith(("pFD", "usage")) and isinstance(value, float):
            found[name] = value
    for name, value in row["samples"].items():
        if name.startswith(("FD", "accuracy")):
            found[name] = value
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row an arm and seed."""
    titles = list(dict.fromkeys(title for row in rows for title in numbers(row)))
    lines = [f"| arm (seed) | updates | CPU-seconds | {' | '.join(titles)} |"]
    lines.append("|---|---|---|" + "---|" * len(titles))
    for row in rows:
        shown = numbers(row)
        cells = [f"{shown[title]:.3g}" if title in shown else "-" for title in titles]
        updates = " + ".join(map(str, row["updates"]))
        lines.append(
            f"| {row['name']} ({row['seed']}) | {updates} | {row['cpu_seconds']:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """The distance of samples over that of reconstructions: the lower left is best."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.add_subplot()
    for row in rows:
        shown = numbers(row)
        across = next(value for name, value in shown.items() if name.startswith("rFD"))
        up = next(value for name, value in shown.items() if name.startswith("FD"))
        color = f"C{list(ARMS).index(row['name'])}"
        marker = "os^v"[row["seed"] % 4]
        panel.plot(across, up, marker, color=color, label=f"{row['name']} ({row['seed']})")
    panel.set_xlabel("distance of reconstructions")
    panel.set_ylabel("distance of samples")
    panel.set_xscale("log")
    panel.set_yscale("log")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(PLOT, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tokenizers for their generators")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/joint"))
    parser.add_argument("--only", nargs="*", choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=5000, help="that are drawn and measured")
    arguments = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for arm in arguments.only or ARMS:
        found = row_of(arm, arguments)
        # Read now: another process may have measured other arms meanwhile.
        rows = {(row["name"], row["seed"]): row for row in read_results(NAME)["rows"]}
        rows[arm, arguments.seed] = found
        order = sorted(rows, key=lambda key: (key[1], list(ARMS).index(key[0])))
        ordered = [rows[key] for key in order]
        write_results(NAME, ordered)
        plot(ordered)
        print(table(ordered), flush=True)


if __name__ == "__main__":
    main()
