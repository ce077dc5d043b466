"""Which metric of a tokenizer foretells its generator? Eight variants of one family (ViT-VQ: patch, codes, updates,
latent perturbation) on Fashion-MNIST, a generator on each.

    python -m benchmarks.studies.token_metrics --data DIR --extractor FILE [--runs DIR] [--only NAME ...]

Trains each tokenizer and a LlamaGen on its tokens (one thread, equal samples), measures the tokenizer by `evaluate.py
tokens` and `evaluate.py probe`, and the generator by `evaluate.py sweep`: guidance is chosen on other seeds than are
reported. Spearman's correlation of every metric with the generators' distance, its bootstrap interval over the variants
and its exact p-value under permutations; all of it once with the given network and once with a second one. Writes
benchmarks/results/studies/token_metrics.json and docs/pictures/token_metrics.png, and prints the tables of
docs/evaluation.md. What is there is not made again; what was interrupted goes on; `--steps show` only prints.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies.steps import (
    EXPORTS,
    ROOT,
    Training,
    command,
    measured,
    read_results,
    write_results,
)

NAME = "token_metrics"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
PICTURE = ROOT / "docs" / "pictures" / "token_metrics.png"
UPDATES = 350  # of a tokenizer, unless the variant says otherwise
GENERATOR_UPDATES = 300
BATCH = 64
RECONSTRUCTED = 2000  # test images of rFD, PSNR, usage
SWAPPED = 1000  # of pFD, which decodes all of them for every pair of alpha and delta
ALPHAS = (0.5, 1.0)
DELTAS = (8, 32)
PROBED = (4000, 2000)  # images that the probes are fitted to, and scored on
SCALES = (1.5, 2.5, 4.0)
TUNING = 300  # images at each guidance, of seeds 0 to 299
REPORTED = 1500  # images at the chosen one, of the seeds behind those
DRAWS = 10_000  # of the bootstrap

TOKENIZER = "--model.init_args.tokenizer.init_args"
GENERATOR = "--model.init_args.generator.init_args"
# bfloat16 took 0.7 of float32's CPU time here, for tokenizers of this width.
SHORT = (
    *("--trainer.precision", "bf16-mixed", "--data.init_args.batch_size", str(BATCH)),
    *("--trainer.limit_val_batches", "8", "--trainer.check_val_every_n_epoch", "null"),
)
TOKENIZER_SIZES = {"width": 64, "encoder_depth": 1, "decoder_depth": 2, "num_heads": 2}
GENERATOR_SIZES = {"width": 128, "depth": 3, "num_heads": 4}


@dataclass(frozen=True)
class Variant:
    """A tokenizer of the family; `swapped` is the share of the images of a batch whose tokens are
    replaced by near codes in training (RobustTok's beta; 0: none).
    """

    name: str
    patch: int = 8
    codes: int = 512
    updates: int = UPDATES
    swapped: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of an image of 32 x 32 pixels."""
        return (32 // self.patch) ** 2

    def training(self) -> Training:
        """The run of the tokenizer."""
        words = [f"{TOKENIZER}.patch_size", str(self.patch)]
        for name, size in TOKENIZER_SIZES.items():
            words += [f"{TOKENIZER}.{name}", str(size)]
        quantizer = {
            "vocab_size": self.codes,
            "restart_every": 50,
            "restart_until": 7 * self.updates // 10,
        }
        for name, value in quantizer.items():
            words += [f"{TOKENIZER}.quantizer.init_args.{name}", str(value)]
        if self.swapped:
            swap = {
                "class_path": "tessellar.training.methods.latent_corruption.Swap",
                "init_args": {"beta": self.swapped},
            }
            words += ["--model.init_args.corruptions", json.dumps([swap])]
        file = "configs/fashion_mnist/tokenizer.yaml"
        return Training(folder_name(self.name), file, (*SHORT, *steps_of(self.updates), *words))

    def generator(self, runs: Path) -> Training:
        """The run of the generator on its tokens."""
        words = ["--model.init_args.tokenizer", str(self.training().folder(runs) / "export")]
        for name, value in GENERATOR_SIZES.items():
            words += [f"{GENERATOR}.{name}", str(value)]
        file = "configs/fashion_mnist/generator.yaml"
        options = (*SHORT, *steps_of(GENERATOR_UPDATES), *words)
        return Training(f"{folder_name(self.name)}-generator", file, options)


VARIANTS = (
    Variant("base"),
    Variant("patch 4", patch=4),
    Variant("64 codes", codes=64),
    Variant("swapped 0.1", swapped=0.1),
    Variant("4096 codes", codes=4096),
    Variant("100 updates", updates=100),
    Variant("swapped 0.5", swapped=0.5),
    Variant("1000 updates", updates=1000),
)


class Correlation(NamedTuple):
    """Spearman's rank correlation, its 95 % bootstrap interval, and the share of all permutations
    with one as large in amount.
    """

    rho: float
    low: float
    high: float
    p: float


def steps_of(updates: int) -> tuple[str, ...]:
    """A run's length; it is validated at the end."""
    return ("--trainer.max_steps", str(updates), "--trainer.val_check_interval", str(updates))


def folder_name(name: str) -> str:
    """A variant's name as that of a run."""
    return name.replace(" ", "-")


def correlation(values: Sequence[float], distances: Sequence[float]) -> Correlation:
    """Of a metric with the generators' distances, a value a variant.

    The bootstrap draws variants with replacement (percentiles; draws in which one side is constant
    say nothing and are left out); p is exact up to 8 variants, above that of 40,320 random orders.
    A metric that is the same for all variants has no correlation: all of it is nan.
    """
    x = np.asarray(values, dtype=float)
    y = np.asarray(distances, dtype=float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(*[float("nan")] * 4)
    everything = np.arange(len(x))[None]
    (whole,) = rank_correlations(x[everything], y[everything])
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(x), size=(DRAWS, len(x)))
    low, high = np.nanpercentile(rank_correlations(x[chosen], y[chosen]), [2.5, 97.5])
    return Correlation(float(whole), float(low), float(high), permuted(x, y))


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of x and y [D, n], float64 [D]; nan where a side is constant."""
    centred = [
        ranks - ranks.mean(axis=1, keepdims=True) for ranks in (mean_ranks(x), mean_ranks(y))
    ]
    products = (centred[0] * centred[1]).sum(axis=1)
    scale = np.sqrt(np.square(centred[0]).sum(axis=1) * np.square(centred[1]).sum(axis=1))
    return np.divide(products, scale, out=np.full(len(x), np.nan), where=scale > 0)


def mean_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of each row [D, n] from 0; equal values share the mean of theirs."""
    below = (x[:, None, :] < x[:, :, None]).sum(axis=2)
    equal = (x[:, None, :] == x[:, :, None]).sum(axis=2)
    return below + (equal - 1) / 2


def permuted(x: np.ndarray, y: np.ndarray) -> float:
    """The share of orders of `y` whose rank correlation with `x` is at least that of `y` in amount."""
    ranks = mean_ranks(x[None])[0] - (len(x) - 1) / 2
    others = mean_ranks(y[None])[0] - (len(x) - 1) / 2
    if len(x) <= 8:
        orders = np.array(list(itertools.permutations(others)))
    else:
        draw = np.random.default_rng(0)
        orders = np.stack([draw.permutation(others) for _ in range(40_320)])
    products = np.abs(orders @ ranks)
    # Rounding must not part orders whose products are equal.
    return float(np.mean(products >= abs(others @ ranks) * (1 - 1e-9)))


def networks_of(row: dict[str, Any]) -> list[str]:
    """Names of the networks that a row was measured with."""
    return [name[3:-1] for name in row["generator"]["metrics"] if name.startswith("FD(")]


def distance_of(row: dict[str, Any], network: str) -> float:
    """The generator's distance to the training images, on the reported seeds."""
    return row["generator"]["metrics"][f"FD({network})"]


def metrics_of(row: dict[str, Any], network: str) -> dict[str, float]:
    """All metrics of a row's tokenizer; distances are those of the network."""
    metrics = row["metrics"]
    cells = row["tokens"]["swaps"]
    swapped = f"rFD({network})"  # of the swapped ones, too
    found = {
        "rFD": metrics[swapped],
        "PSNR": metrics["PSNR"],
        "SSIM": metrics["SSIM"],
        "pFD, mean": mean(cell[swapped] for cell in cells),
    }
    for cell in cells:
        found[f"pFD, alpha {cell['alpha']:g}, delta {cell['delta']}"] = cell[swapped]
    found["pFD over rFD"] = found["pFD, mean"] / found["rFD"]
    found["usage"] = metrics["usage"]
    found["evenness"] = metrics["evenness"]
    found["bits of a position"] = mean(row["tokens"]["bits by position"])
    found["bits of an image"] = sum(row["tokens"]["bits by position"])
    found["tokens of an image"] = float(row["variant"]["tokens"])
    for name, value in row["probes"].items():
        if "shuffled" not in name:
            found[name] = value
    return found


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Correlation]]:
    """By network, by metric."""
    found: dict[str, dict[str, Correlation]] = {}
    for network in networks_of(rows[0]):
        distances = [distance_of(row, network) for row in rows]
        columns = [metrics_of(row, network) for row in rows]
        found[network] = {
            name: correlation([column[name] for column in columns], distances)
            for name in columns[0]
        }
    return found


def row_of(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a variant."""
    training = variant.training()
    export = training.folder(arguments.runs) / "export"
    cache = ("--batch_size", "250", "--cache", str(arguments.runs / ".cache"))
    networks = (str(arguments.extractor), str(SECOND))
    of_tokens = measured(
        training.folder(arguments.runs) / "tokens.json",
        "evaluate.py",
        *("tokens", str(export), "--extractor", *networks, *FASHION, str(arguments.data)),
        *("--count", str(RECONSTRUCTED), "--prefix_count", str(SWAPPED)),
        *("--alpha", *map(str, ALPHAS), "--delta", *map(str, DELTAS), *cache),
    )
    of_probes = measured(
        training.folder(arguments.runs) / "probe.json",
        "evaluate.py",
        *("probe", str(export), *FASHION, str(arguments.data), "--batch_size", "250"),
        *("--train_count", str(PROBED[0]), "--count", str(PROBED[1])),
        *("--features", "latents", "tokens", "codes", "--probes", "linear", "purity"),
        *("--protocol.pooling", "flat"),
    )
    generator = variant.generator(arguments.runs)
    sweep = generator.folder(arguments.runs) / "sweep"
    if not (sweep / "sweep.json").exists():
        command(
            "evaluate.py",
            *("sweep", str(generator.folder(arguments.runs) / "export"), "--extractor", *networks),
            *(*FASHION, str(arguments.data), "--metrics", "[fd,accuracy]", *cache),
            *("--count", str(TUNING), "--final_count", str(REPORTED), "--out", str(sweep)),
            *("--axes", json.dumps({"guidance.scale": list(SCALES)})),
        )
    swept = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    points = []
    for point in swept["points"]:
        points.append({"guidance": point["values"]["guidance.scale"], **point["metrics"]})
    return {
        "name": variant.name,
        "variant": {**vars(variant), "tokens": variant.tokens},
        "training": training.facts(arguments.runs),
        "metrics": of_tokens["metrics"],
        "tokens": of_tokens["tokens"],
        "probes": of_probes["metrics"],
        "generator": {
            "training": generator.facts(arguments.runs),
            "guidance": swept["chosen"]["guidance.scale"],
            "tuning": points,
            "metrics": swept["final"]["metrics"],
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a variant."""
    networks = networks_of(rows[0])
    titles = ["variant", "tokens", "PSNR", *[f"rFD({name})" for name in networks]]
    titles += ["pFD", "usage", "bits of a position", "linear, tokens", "guidance"]
    titles += [f"generator's FD({name})" for name in networks]
    titles += ["accuracy", "CPU-s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        metrics = metrics_of(row, networks[0])
        cells = [row["name"], str(row["variant"]["tokens"]), f"{metrics['PSNR']:.2f}"]
        cells += [f"{row['metrics'][f'rFD({name})']:.3g}" for name in networks]
        cells += [f"{metrics['pFD, mean']:.2f}", f"{metrics['usage']:.0%}"]
        cells += [f"{metrics['bits of a position']:.2f}", f"{metrics['linear(tokens)']:.3f}"]
        generator = row["generator"]
        cells.append(f"{generator['guidance']:g}")
        cells += [f"{distance_of(row, name):.2f}" for name in networks]
        cells.append(f"{generator['metrics'][f'accuracy({networks[0]})']:.2f}")
        seconds = [row["training"]["cpu_seconds"], generator["training"]["cpu_seconds"]]
        cells.append(" + ".join(f"{value:,.0f}" for value in seconds))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def correlation_table(found: dict[str, dict[str, Correlation]]) -> str:
    """Markdown: a metric a row, correlation, interval and p by each network."""
    names = list(found)
    lines = [f"| metric | {' | '.join(f'with FD({name})' for name in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for metric in found[names[0]]:
        cells = [metric, *[spelled(found[name][metric]) for name in names]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spelled(one: Correlation) -> str:
    """A cell of the table."""
    if np.isnan(one.rho):
        return "all equal"
    return f"{one.rho:+.2f} ({one.low:+.2f} to {one.high:+.2f}), p {one.p:.3f}"


def picture(rows: Sequence[dict[str, Any]]) -> None:
    """The generators' distance over six metrics, by the first network."""
    network = networks_of(rows[0])[0]
    found = correlations(rows)[network]
    shown = ("rFD", "PSNR", "pFD, mean", "linear(tokens)", "evenness")
    figure = Figure(figsize=(15, 6.5))
    panels = figure.subplots(2, 3)
    for axes, name in zip(panels.flat, (*shown, "bits of a position"), strict=True):
        for number, row in enumerate(rows):
            x = metrics_of(row, network)[name]
            axes.plot(x, distance_of(row, network), "o", color=f"C{number}", label=row["name"])
        axes.set_xlabel(name)
        axes.set_ylabel(f"generator's FD({network})", fontsize=8)
        axes.set_title(spelled(found[name]), fontsize=9)
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=80)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Rows, what they have in common, and correlations once there are three."""
    facts: dict[str, Any] = {
        "batch": BATCH,
        "generator updates": GENERATOR_UPDATES,
        "images": {
            "reconstructed": RECONSTRUCTED,
            "swapped": SWAPPED,
            "probed": list(PROBED),
            "tuning": TUNING,
            "reported": REPORTED,
        },
    }
    if len(rows) > 2:
        facts["spearman"] = {}
        for network, found in correlations(rows).items():
            # JSON has no nan: a metric that is the same for all is left out.
            known = {name: one._asdict() for name, one in found.items() if not np.isnan(one.rho)}
            facts["spearman"][network] = known
    write_results(NAME, rows, **facts)


def train(variants: Sequence[Variant], arguments: argparse.Namespace) -> None:
    """The tokenizer of each, then its generator."""
    for variant in variants:
        variant.training().make(arguments.runs, arguments.data)
        variant.generator(arguments.runs).make(arguments.runs, arguments.data)


def measure(variants: Sequence[Variant], arguments: argparse.Namespace) -> None:
    """Rows of the variants, each written when it is done; those of others stay."""
    for variant in variants:
        row = row_of(variant, arguments)
        rows = {one["name"]: one for one in read_results(NAME)["rows"]}
        rows[variant.name] = row
        write([rows[one.name] for one in VARIANTS if one.name in rows])


def show() -> None:
    """Tables and picture of what was measured."""
    rows = read_results(NAME)["rows"]
    print(table(rows))
    if len(rows) > 2:
        picture(rows)
        print(correlation_table(correlations(rows)), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all variants, or those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/token_metrics"))
    parser.add_argument("--only", nargs="+", choices=[one.name for one in VARIANTS])
    steps = ("train", "measure", "show")
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if set(arguments.steps) != {"show"}:
        if arguments.data is None or arguments.extractor is None:
            parser.error("training and measuring need --data and --extractor")
        for name in ("data", "extractor", "runs"):
            setattr(arguments, name, getattr(arguments, name).resolve())
    chosen = [one for one in VARIANTS if arguments.only is None or one.name in arguments.only]
    if "train" in arguments.steps:
        train(chosen, arguments)
    if "measure" in arguments.steps:
        measure(chosen, arguments)
    if "show" in arguments.steps:
        show()


if __name__ == "__main__":
    main()
