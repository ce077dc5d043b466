"""Heads on the same tokens: a softmax, two sub-tokens, masked bits and binary diffusion on one binary tokenizer,
dimension-wise prediction and a diffusion head on one KL autoencoder, on Fashion-MNIST.

    python -m benchmarks.studies.heads --data DIR --extractor FILE [--runs DIR] [--only NAME ...] [--steps train]

Trains two tokenizers and ten generators (float32, one thread, equal samples), chooses the guidance of each on tuning
seeds by the given network, measures that on other seeds with it and with a second network that is trained here, counts
evaluations, times sampling, asks for nats where there is a likelihood, and writes benchmarks/results/studies/heads.json
and docs/pictures/heads.png; prints the tables of docs/generators.md. What is there is not made again; what was
interrupted goes on.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.studies.head_memory import BITS, head_memory
from benchmarks.studies.steps import (
    EXPORTS,
    ROOT,
    Training,
    command,
    measured,
    read_results,
    write_results,
)
from tessellar.cli.evaluation_sweep import varied
from tessellar.data.sets.fashion_mnist import FashionMNISTData
from tessellar.images import to_uint8
from tessellar.models.bar import BAR
from tessellar.models.bitdance import BitDance
from tessellar.models.llamagen import LlamaGen
from tessellar.models.mar import MAR
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.condition import Condition
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling

log = logging.getLogger(__name__)
NAME = "heads"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
PICTURE = ROOT / "docs" / "pictures" / "heads.png"
UPDATES = 500
BATCH = 32
WIDTH = 128
TUNING = 400  # images at each guidance, of seeds 0 to 399
REPORTED = 2000  # images at the chosen one, of the seeds behind those
SCALES = (2.0, 3.0)
MORE_SCALES = (1.5, 2.0, 3.0)
LIKELY = 1024  # test images whose nats are taken
SEEN = 20  # images of a head in the picture, two of each class

GENERATOR = "--model.init_args.generator.init_args"
LENGTH = ("--data.init_args.batch_size", str(BATCH), "--trainer.limit_val_batches", "16")
REGROUPED = "tessellar.tokenizers.parts.regrouped_bits.RegroupedBits"
QUANTISED = "tessellar.tokenizers.tokenbridge.PostQuantized"


def tokenizer(name: str, updates: int) -> Training:
    """A tokenizer of a config, shorter and in smaller batches."""
    steps = ("--trainer.max_steps", str(updates), "--trainer.val_check_interval", "400")
    return Training(name, f"configs/fashion_mnist/{name}.yaml", (*LENGTH, *steps))


BINARY = tokenizer("bar_fsq", 1200)
LATENT = tokenizer("kl_f4", 800)


@dataclass(frozen=True)
class Head:
    """A generator: its config with `options`, on tokens of `of` in the `form` of a class and its arguments.

    `sampling` are words of the command line, `scales` the guidances that are tried; the guidance of
    the head `tuned_by` is taken instead where there is one. `run` is the run that is sampled, of
    the same name unless it is that of another head with other `sampling`.
    """

    name: str
    config: str
    kind: type[Any]
    options: dict[str, Any]
    form: tuple[str, dict[str, Any]] | None = None
    of: Training = BINARY
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = SCALES
    tuned_by: str = ""
    run: str = ""

    @property
    def sizes(self) -> dict[str, Any]:
        """What is given to the generator."""
        return {"width": WIDTH, "num_heads": 4, **self.options}

    def training(self, runs: Path) -> Training:
        """The run that makes it."""
        path = str(self.of.folder(runs) / "export")
        read = path
        if self.form is not None:
            class_path, given = self.form
            init_args = {"tokenizer": path, **given}
            read = json.dumps({"class_path": class_path, "init_args": init_args})
        words = ["--seed_everything", str(self.seed), "--model.init_args.tokenizer", read]
        for name, value in self.sizes.items():
            words += [f"{GENERATOR}.{name}", json.dumps(value)]
        steps = ("--trainer.max_steps", str(UPDATES), "--trainer.val_check_interval", str(UPDATES))
        file = f"configs/fashion_mnist/{self.config}.yaml"
        return Training(self.run or self.name, file, (*LENGTH, *steps, *words))


CODES = (REGROUPED, {"form": "index"})
TWO = (REGROUPED, {"form": "index", "split": [4, 8]})
LEVELS = (QUANTISED, {"levels": 32})
LLAMA = {"depth": 4, "ffn_multiple_of": 64}
BIT_HEAD = {"depth": 4, "head_width": 128, "head_depth": 2}
FLOW_HEAD = {**BIT_HEAD, "head_dim": 32}
CHANNEL_HEAD = {"depth": 2, "head_width": 128, "head_depth": 2}
# The published samplers, with fewer steps where they have many.
TO_DATA = {
    "guidance": "Linear",
    "guidance.reach_end": False,
    "flow": "EulerMaruyamaToData",
    "flow.steps": 21,
}
SETS = {"algorithm.steps": 16, "guidance": "Revealed"}
# BAR's temperature falls within a token: at 1 all samples of a class look alike.
UNMASKED = {"guidance": "Linear", "choice.temperature": 2.5, "choice.bit_steps": [2, 2, 3, 5]}
HEADS = (
    Head("softmax-0", "generator", LlamaGen, LLAMA, CODES, scales=MORE_SCALES),
    Head("softmax-1", "generator", LlamaGen, LLAMA, CODES, seed=1, tuned_by="softmax-0"),
    Head("softmax-2", "generator", LlamaGen, LLAMA, CODES, seed=2, tuned_by="softmax-0"),
    Head("two-sub-tokens", "open_magvit2_ar", OpenMAGVIT2AR, LLAMA, TWO, scales=MORE_SCALES),
    Head("bar", "bar", BAR, BIT_HEAD, sampling=UNMASKED, scales=MORE_SCALES),
    Head("bitdance-1x", "bitdance", BitDance, FLOW_HEAD, sampling=TO_DATA),
    Head("bitdance-4x", "bitdance_4x", BitDance, FLOW_HEAD, sampling=TO_DATA),
    Head("bitdance-16x", "bitdance_4x", BitDance, {**FLOW_HEAD, "patch": 4}, sampling=TO_DATA),
    Head("tokenbridge", "tokenbridge", TokenBridge, CHANNEL_HEAD, LEVELS, LATENT, sampling=SETS),
    Head(
        "mar",
        "mar",
        MAR,
        CHANNEL_HEAD,
        of=LATENT,
        sampling={**SETS, "diffusion.steps": 25, "diffusion.clip": 4.0},
    ),
    # One change to TokenBridge: the backbone. Its tokens, channel by channel, behind a causal transformer.
    Head("tokenbridge-causal", "open_magvit2_ar", OpenMAGVIT2AR, LLAMA, LEVELS, LATENT),
)


def swept(head: Head, export: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The guidance chosen, the distances at each, and those on other seeds."""
    folder = arguments.runs / "sweeps" / head.name
    scales = head.scales
    if head.tuned_by:
        other = arguments.runs / "sweeps" / head.tuned_by / "sweep.json"
        scales = (json.loads(other.read_text(encoding="utf-8"))["chosen"]["guidance.scale"],)
    if not (folder / "sweep.json").exists():
        words = [str(export), "--extractor", str(arguments.extractor), str(SECOND)]
        words += ["--metrics", "[fd,accuracy]", *FASHION, str(arguments.data)]
        words += ["--count", str(TUNING), "--final_count", str(REPORTED), "--batch_size", "200"]
        words += ["--cache", str(arguments.runs / ".cache"), "--out", str(folder)]
        for name, value in head.sampling.items():
            words.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
        # A single value is an axis too, so that every sweep says which it took.
        words += ["--axes", json.dumps({"guidance.scale": list(scales)})]
        command("evaluate.py", "sweep", *words)
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def sampling_of(head: Head, scale: float) -> Sampling:
    """The settings of the last measurement."""
    return varied(Sampling(), {**head.sampling, "guidance.scale": scale})


def head_modules(generator: nn.Module) -> list[nn.Module]:
    """Modules of which one is called for each evaluation of the head."""
    match generator:
        case LlamaGen():
            return [generator.output]
        case OpenMAGVIT2AR():
            return list(generator.intra.outputs)
        case BAR():
            return [generator.bit_head]
        case BitDance():
            return [generator.denoiser]
        case TokenBridge():
            return list(generator.head.outputs)
        case MAR():
            return [generator.head]
    raise TypeError(f"{type(generator).__name__} has no head that is known here")


@torch.no_grad()
def cost(
    model: ImageGenerator, sampling: Sampling, batch: int = 50, rounds: int = 3
) -> dict[str, float]:
    """Evaluations an image of the backbone and of the head, and images a CPU-second of a batch, the
    fastest of some rounds, decoding included.
    """
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [module.register_forward_hook(count) for module in head_modules(model.generator)]
    recorder = Recorder()
    seconds = []
    condition = model.class_condition([number % 10 for number in range(batch)])
    for number in range(rounds):
        start = time.process_time()
        kept = recorder if number == 0 else None
        model.decode(model.sample_tokens(condition, sampling, range(batch), kept))
        seconds.append(time.process_time() - start)
    for hook in hooks:
        hook.remove()
    return {
        "backbone": recorder.evaluations / batch,
        "head": calls / rounds,
        "images_per_cpu_second": batch / min(seconds),
    }


@torch.no_grad()
def nats_of(model: ImageGenerator, data: Path) -> float | None:
    """Mean nats of the first test images under their classes; None where there is no likelihood.

    BAR's is that of bits set by set, three at a time in channel order.
    """
    if isinstance(model.generator, BAR):
        model.generator.sets = (3, 3, 3, 3)
    found = []
    images = FashionMNISTData(str(data)).val_dataset()
    for index in torch.arange(LIKELY).split(128):
        batch: Any = images.batch(index.tolist())
        tokens = model.tokenizer.encode(batch["image"])
        nats = model.generator.nats(tokens, Condition(batch["label"]))
        if nats is None:
            return None
        found.append(nats)
    if isinstance(model.generator, BAR):
        model.generator.sets = None
    return float(torch.cat(found).mean())


def tokenizer_row(training: Training, arguments: argparse.Namespace) -> dict[str, Any]:
    """The floor of its generators: reconstructions of as many test images."""
    folder = training.folder(arguments.runs)
    record = measured(
        folder / "reconstruction.json",
        "evaluate.py",
        *("model", str(folder / "export"), *FASHION, str(arguments.data), "--batch_size", "200"),
        *("--extractor", str(arguments.extractor), str(SECOND), "--metrics", "[fd,paired]"),
        *("--count", str(REPORTED)),
        *("--cache", str(arguments.runs / ".cache")),
    )
    return {
        "name": training.name,
        "metrics": record["metrics"],
        "training": training.facts(arguments.runs),
    }


def row_of(head: Head, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a head."""
    training = head.training(arguments.runs)
    export = training.folder(arguments.runs) / "export"
    sweep = swept(head, export, arguments)
    scale = sweep["chosen"]["guidance.scale"]
    model = load(str(export))
    assert isinstance(model, ImageGenerator)
    model.eval()
    memory = {}
    for bits in BITS:
        memory[str(bits)] = head_memory(head.kind, generator_options(model), bits)
    points = []
    for point in sweep["points"]:
        points.append({"guidance": point["values"]["guidance.scale"], **point["metrics"]})
    return {
        "name": head.name,
        "parameters": sum(tensor.numel() for tensor in model.generator.parameters()),
        "training": training.facts(arguments.runs),
        "guidance": scale,
        "tuning": points,
        "metrics": sweep["final"]["metrics"],
        "nats": nats_of(model, arguments.data),
        "cost": cost(model, sampling_of(head, scale)),
        "memory": memory,
    }


def generator_options(model: ImageGenerator) -> dict[str, Any]:
    """The arguments that a generator was made with, but for its layout."""
    options = dict(model.generator.config["init_args"])
    options.pop("layout", None)
    return options


def is_softmax(row: dict[str, Any]) -> bool:
    return row["name"].startswith("softmax")


def distance_of(row: dict[str, Any]) -> float:
    """By the first network."""
    return next(value for name, value in row["metrics"].items() if name.startswith("FD("))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a head; `ratio` is to the mean of the softmax's seeds."""
    softmax = [distance_of(row) for row in rows if is_softmax(row)]
    distances = [name for name in rows[0]["metrics"] if name.startswith("FD(")]
    titles = ["head", "parameters", "guidance", *distances, "ratio", "accuracy", "nats"]
    titles += ["backbone", "head", "images/CPU-s", "CPU-s of training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        metrics = row["metrics"]
        cells = [row["name"], f"{row['parameters']:,}", f"{row['guidance']:g}"]
        cells += [f"{metrics[name]:.2f}" for name in distances]
        cells.append(f"{distance_of(row) / mean(softmax):.2f}" if softmax else "-")
        accuracy = next(value for name, value in metrics.items() if name.startswith("accuracy"))
        cells += [f"{accuracy:.2f}", "-" if row["nats"] is None else f"{row['nats']:.1f}"]
        cells += [f"{row['cost']['backbone']:.0f}", f"{row['cost']['head']:.0f}"]
        cells += [
            f"{row['cost']['images_per_cpu_second']:.1f}",
            f"{row['training']['cpu_seconds']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(softmax) > 1:
        lines.append(
            f"\nsoftmax: {mean(softmax):.2f} ± {stdev(softmax):.2f} over {len(softmax)} seeds"
        )
    return "\n".join(lines)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: parameters and bytes of activations by the number of codes."""
    titles = [f"2^{bits}: {what}" for bits in BITS for what in ("parameters", "activations")]
    lines = [f"| head | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for row in rows:
        cells = [row["name"]]
        for bits in BITS:
            memory = row["memory"][str(bits)]
            cells += [f"{memory['parameters']:,}", sized(memory["bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sized(count: float) -> str:
    """Bytes as a short number."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@torch.no_grad()
def picture(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Two samples of each class of each head, of the first reporting seeds."""
    figure = Figure(figsize=(2 * len(rows), 6))
    panels = figure.subplots(2, (len(rows) + 1) // 2, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    heads = {head.name: head for head in HEADS}
    for panel, row in zip(panels.flat, rows, strict=False):
        model = load(
            str(heads[row["name"]].training(arguments.runs).folder(arguments.runs) / "export")
        )
        assert isinstance(model, ImageGenerator)
        model.eval()
        condition = model.class_condition([number // 2 for number in range(SEEN)])
        seeds = range(TUNING, TUNING + SEEN)
        sampling = sampling_of(heads[row["name"]], row["guidance"])
        images = to_uint8(model.decode(model.sample_tokens(condition, sampling, seeds)))
        grid = images[:, 0].unflatten(0, (5, 4)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
        panel.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=255)
        panel.set_title(f"{row['name']}: {distance_of(row):.2f}", fontsize=9)
    figure.savefig(PICTURE, dpi=80, bbox_inches="tight")


def make_network(data: Path) -> None:
    """The second evaluator."""
    if SECOND.exists():
        return
    words = ["extractor", "--purpose", "evaluator", *FASHION, str(data), "--data.batch_size", "128"]
    words += ["--architecture.arch", "test_convnext", "--architecture.name", SECOND.stem]
    words += ["--architecture.options", json.dumps({"patch_size": 4})]
    words += ["--recipe.seed", "8", "--recipe.epochs", "2", "--out", str(SECOND)]
    command("evaluate.py", *words)


def train(heads: Sequence[Head], arguments: argparse.Namespace) -> None:
    """The tokenizers that the heads need, and the heads, one after the other."""
    for head in heads:
        head.of.make(arguments.runs, arguments.data)
        head.training(arguments.runs).make(arguments.runs, arguments.data)


def measure(heads: Sequence[Head], arguments: argparse.Namespace) -> None:
    """Rows of the heads; those of others stay as they were written."""
    make_network(arguments.data)
    for head in heads:
        of_tokens = tokenizer_row(head.of, arguments)
        row = row_of(head, arguments)
        # Read now: another process may have measured other heads meanwhile.
        known = read_results(NAME)
        tokenizers = {one["name"]: one for one in known.get("tokenizers", [])}
        tokenizers[of_tokens["name"]] = of_tokens
        rows = {one["name"]: one for one in known["rows"]}
        rows[head.name] = row
        ordered = [rows[one.name] for one in HEADS if one.name in rows]
        facts: dict[str, Any] = {"updates": UPDATES, "batch": BATCH, "tuning": TUNING}
        facts |= {"reported": REPORTED, "tokenizers": list(tokenizers.values())}
        write_results(NAME, ordered, **facts)
        print(table(ordered), memory_table(ordered), sep="\n\n", flush=True)


def show(heads: Sequence[Head], arguments: argparse.Namespace) -> None:
    """The picture and the tables of what was measured."""
    names = [head.name for head in heads]
    rows = [row for row in read_results(NAME)["rows"] if row["name"] in names]
    picture(rows, arguments)
    print(table(rows), memory_table(rows), sep="\n\n", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all heads, or those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=[head.name for head in HEADS])
    steps = {"train": train, "measure": measure, "show": show}
    parser.add_argument("--steps", nargs="+", choices=list(steps), default=list(steps))
    arguments = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    heads = [head for head in HEADS if arguments.only is None or head.name in arguments.only]
    for step in arguments.steps:
        steps[step](heads, arguments)


if __name__ == "__main__":
    main()
