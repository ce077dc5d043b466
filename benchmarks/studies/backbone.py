"""Why MAR and TokenBridge are behind at a small budget: one thing changed at a time, on Fashion-MNIST.

    python -m benchmarks.studies.backbone --data DIR --extractor FILE [--runs DIR] [--only NAME ...] [--steps train]

On the latents of one KL autoencoder (as `heads.py` has it, trained in bfloat16) it trains MAR and TokenBridge, each
with one change to the backbone, its tables of positions, its order of tokens, its masks, its optimizer or its samples;
samples them at one guidance with seeds of their own; and asks for the loss of the next token in raster order by how
much of the image is known. Writes benchmarks/results/studies/backbone.json; prints the tables of docs/generators.md.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.studies.backbone_parts import CausalMAR, RasterMAR
from benchmarks.studies.heads import (
    CHANNEL_HEAD,
    GENERATOR,
    LENGTH,
    LEVELS,
    LLAMA,
    WIDTH,
    tokenizer,
)
from benchmarks.studies.steps import Training, read_results, write_results
from tessellar.cli.evaluation_run import Measurement
from tessellar.cli.evaluation_sweep import varied
from tessellar.data.sets.fashion_mnist import FashionMNISTData
from tessellar.evaluation.engine import Yardstick, evaluate
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.protocols import protocol
from tessellar.models.mar import MAR
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.pipeline import ImageGenerator, load
from tessellar.processes.diffusion import TRAINING_STEPS
from tessellar.protocol.condition import Condition
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling

log = logging.getLogger(__name__)
NAME = "backbone"
BFLOAT16 = ("--trainer.precision", "bf16-mixed")
UPDATES = 250  # half of those of heads.py
# Its pictures would cost as much as the training.
NO_VALIDATION = ("--trainer.limit_val_batches", "0")
DECAY = ("--model.init_args.schedule.decay_start", "0.66")
LATENT = tokenizer("kl_f4", 800)
IMAGES = 200  # samples of a row, of seeds 0 to 199
LIKELY = 256  # test images whose losses are taken
KNOWN = (0, 4, 11, 18, 25, 32, 39, 46, 53, 60)  # places before the one that is asked for
DRAWS = 16  # noise levels of each token of a diffusion loss
READ = (0, 4, 8, 16, 24, 32, 48)  # random known tokens whose worth is asked for
READ_DRAWS = 4  # noise levels there

MASKED = {"width": WIDTH, "num_heads": 4, **CHANNEL_HEAD}
CAUSAL = {"num_classes": 10, "num_heads": 4, "dropout": 0.0, **LLAMA}
DIFFUSION = {"diffusion.steps": 25, "diffusion.clip": 4.0, "guidance.scale": 3.0}
SETS = {"algorithm.steps": 16, "guidance": "Revealed"}
ONE_BY_ONE = {**SETS, "algorithm.steps": 64}
ADAMW = ("--model.init_args.optimizer.name", "adamw")


@dataclass(frozen=True)
class Run:
    """A generator that is trained: its class's path where it is not that of the config, the arguments
    that differ, further words of the command line, and its updates.
    """

    name: str
    config: str
    given: dict[str, Any]
    class_path: str = ""
    words: tuple[str, ...] = ()
    updates: int = UPDATES

    def training(self, runs: Path) -> Training:
        read: Any = str(LATENT.folder(runs) / "export")
        if self.config != "mar":
            class_path, levels = LEVELS
            read = json.dumps(
                {"class_path": class_path, "init_args": {"tokenizer": read, **levels}}
            )
        words = ["--model.init_args.tokenizer", read]
        if self.class_path:
            generator = {"class_path": self.class_path, "init_args": self.given}
            words += ["--model.init_args.generator", json.dumps(generator), "--package", TRUST[0]]
        else:
            for name, value in self.given.items():
                words += [f"{GENERATOR}.{name}", json.dumps(value)]
        updates = str(self.updates)
        steps = ("--trainer.max_steps", updates, "--trainer.val_check_interval", updates)
        file = f"configs/fashion_mnist/{self.config}.yaml"
        return Training(
            self.name,
            file,
            (*BFLOAT16, *LENGTH, *steps, *NO_VALIDATION, *DECAY, *words, *self.words),
        )


PARTS = "benchmarks.studies.backbone_parts"
TRUST = ("benchmarks",)  # whose classes may be built
# What the config says beside the arguments of the study, for a class that replaces its own.
MAR_OPTIONS = {**MASKED, "num_classes": 10, "buffer": 4, "dropout": 0.0, "repeats": 4, "steps": 16}
BRIDGE_OPTIONS = {
    **MASKED,
    "head_heads": 4,
    "num_classes": 10,
    "buffer": 4,
    "dropout": 0.0,
    "steps": 16,
}
BEHIND = {"width": WIDTH, "head_width": 128, "head_depth": 2, "options": CAUSAL}
RUNS = (
    Run("mar", "mar", MASKED),
    Run("mar-causal", "mar", BEHIND, f"{PARTS}.CausalMAR"),
    Run("mar-causal-rotary", "mar", {**BEHIND, "rotations": True}, f"{PARTS}.CausalMAR"),
    Run("mar-grid", "mar", {"options": MAR_OPTIONS}, f"{PARTS}.GridMAR"),
    Run("mar-least-0", "mar", {**MASKED, "least_masked": 0.0}),
    Run("mar-uniform", "mar", {"options": MAR_OPTIONS}, f"{PARTS}.UniformMAR"),
    Run(
        "mar-uniform-x3",
        "mar",
        {"options": MAR_OPTIONS},
        f"{PARTS}.UniformMAR",
        updates=3 * UPDATES,
    ),
    Run("mar-raster", "mar", {**MAR_OPTIONS, "least_masked": 0.0}, f"{PARTS}.RasterMAR"),
    Run("mar-adamw", "mar", MASKED, words=ADAMW),
    Run("mar-x3", "mar", MASKED, updates=3 * UPDATES),
    Run("mar-x6", "mar", MASKED, updates=6 * UPDATES),
    Run("mar-causal-x3", "mar", BEHIND, f"{PARTS}.CausalMAR", updates=3 * UPDATES),
    Run("tokenbridge", "tokenbridge", MASKED),
    Run("tokenbridge-grid", "tokenbridge", {"options": BRIDGE_OPTIONS}, f"{PARTS}.GridTokenBridge"),
    Run("tokenbridge-causal", "open_magvit2_ar", {"width": WIDTH, "num_heads": 4, **LLAMA}),
)


@dataclass(frozen=True)
class Row:
    """A run, sampled in one way; `raster` draws a masked generator's tokens in raster order."""

    name: str
    run: str
    sampling: dict[str, Any] = field(default_factory=dict)
    raster: bool = False


def rows_of(run: Run) -> list[Row]:
    """What is sampled of a run."""
    is_mar = run.name.startswith("mar")
    base = DIFFUSION if is_mar else {"guidance.scale": 3.0}
    if "causal" in run.name:
        return [Row(run.name, run.name, base)]
    rows = [Row(run.name, run.name, {**base, **SETS})]
    if run.name in ("mar", "tokenbridge"):
        cooler = {"diffusion.temperature": 0.9} if is_mar else {"choice.temperature": 0.9}
        rows += [
            Row(f"{run.name}: 64 sets", run.name, {**base, **ONE_BY_ONE}),
            Row(f"{run.name}: 64 sets, raster order", run.name, {**base, **ONE_BY_ONE}, True),
            Row(f"{run.name}: temperature 0.9", run.name, {**base, **SETS, **cooler}),
            Row(f"{run.name}: one guidance", run.name, {**base, "algorithm.steps": 16}),
        ]
    if run.name == "mar-raster":
        rows = [Row(run.name, run.name, {**base, **ONE_BY_ONE})]
    return rows


class Judge:
    """Distances of samples to the training images."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data = FashionMNISTData(str(arguments.data))
        cache = str(arguments.runs / ".cache")
        extractors = [str(arguments.extractor)]
        measurement = Measurement(protocol("free"), extractors, None, "cpu", cache, 200)
        references = measurement.references(["train"], self.data)
        self.yardsticks: list[Yardstick] = measurement.yardsticks(references)

    def metrics(self, model: ImageGenerator, sampling: Sampling) -> dict[str, float]:
        source = GeneratedImages(model, IMAGES, sampling, data=self.data.val_dataset())
        record = evaluate(source, self.yardsticks, metrics=["fd", "accuracy"], batch_size=200)
        return record["metrics"]


@torch.no_grad()
def next_losses(
    model: ImageGenerator, data: Path, count: int = LIKELY, draws: int = DRAWS
) -> list[float]:
    """Mean loss of the token behind each number of `KNOWN` tokens in raster order, given those, of the
    first `count` test images under their classes: MAR's loss at `draws` noise levels a token, or
    TokenBridge's in nats a channel.
    """
    images = FashionMNISTData(str(data)).val_dataset()
    batch: Any = images.batch(list(range(count)))
    torch.manual_seed(0)
    tokens = model.tokenizer.encode(batch["image"])
    condition = Condition(batch["label"])
    generator = model.generator
    shape = (draws * tokens.shape[0] * tokens.shape[1],)
    t = torch.randint(TRAINING_STEPS, shape)
    noise = torch.randn(*shape, tokens.shape[2])
    if isinstance(generator, CausalMAR):
        losses = generator.token_losses(tokens, condition, t, noise).mean((0, 1))
        return losses[list(KNOWN)].tolist()
    if isinstance(generator, OpenMAGVIT2AR):
        return causal_nats(generator, tokens, condition)[list(KNOWN)].tolist()
    found = []
    for before in KNOWN:
        known = (torch.arange(tokens.shape[1]) < before).expand(tokens.shape[:2])
        found.append(masked_loss_at(generator, tokens, known, condition, t, noise))
    return found


def masked_loss_at(
    generator: Any, tokens: Tensor, known: Tensor, condition: Condition, t: Tensor, noise: Tensor
) -> float:
    """Mean loss of the first token that is not `known` [B, N], given those that are."""
    place = int(known[0].sum())
    if isinstance(generator, TokenBridge):
        z = generator.vectors(tokens, known, condition)[:, place]
        classes = generator.channels.classes(tokens[:, place])
        losses = []
        for given, wanted in zip(generator.head(z, classes), classes.unbind(1), strict=True):
            losses.append(F.cross_entropy(given, wanted))
        return float(torch.stack(losses).mean())
    patches = generator.to_patches(tokens)
    draws = len(t) // known.numel()
    z = generator.backbone(patches, known, condition)[:, place].repeat(draws, 1)
    clean = patches[:, place].repeat(draws, 1)
    # The same levels and noises as of the causal one, which has them for every place.
    at = t.view(draws, *tokens.shape[:2])[:, :, place].flatten()
    drawn = noise.view(draws, *tokens.shape)[:, :, place].flatten(0, 1)
    return float(generator.row_losses(clean, z, at, drawn).mean())


def causal_nats(generator: OpenMAGVIT2AR, tokens: Tensor, condition: Condition) -> Tensor:
    """Mean nats a channel at each place [N]."""
    log_prob = generator.score(tokens, condition).log_prob(tokens)
    assert log_prob is not None
    return -log_prob.mean(0) / tokens.shape[2]


def measured_row(row: Row, arguments: argparse.Namespace, judge: Judge) -> dict[str, Any]:
    """Samples of a run, drawn in one way."""
    run = next(one for one in RUNS if one.name == row.run)
    training = run.training(arguments.runs)
    model = load(str(training.folder(arguments.runs) / "export"), trust=TRUST)
    assert isinstance(model, ImageGenerator)
    model.eval()
    if row.raster:
        assert isinstance(model.generator, MAR | TokenBridge)
        model.generator.plan = raster_plan(model.generator)  # type: ignore[method-assign]
    sampling = varied(Sampling(), row.sampling)
    start = time.process_time()
    metrics = judge.metrics(model, sampling)
    seconds = time.process_time() - start
    return {
        "name": row.name,
        "run": row.run,
        "parameters": sum(tensor.numel() for tensor in model.generator.parameters()),
        "training": training.facts(arguments.runs),
        "sampling": row.sampling,
        "metrics": metrics,
        "cpu_seconds": seconds,
        "losses": next_losses(model, arguments.data) if row.name == row.run else None,
    }


@torch.no_grad()
def reading_of(model: ImageGenerator, data: Path) -> dict[int, list[float]]:
    """Mean loss of MAR's unknown tokens by how many random ones of the 64 are known, and the same where
    those are another image's: what it reads of them.
    """
    images = FashionMNISTData(str(data)).val_dataset()
    batch: Any = images.batch(list(range(LIKELY)))
    generator: Any = model.generator
    torch.manual_seed(0)
    patches = generator.to_patches(model.tokenizer.encode(batch["image"]))
    condition = Condition(batch["label"])
    t = torch.randint(TRAINING_STEPS, (READ_DRAWS * patches[..., 0].numel(),))
    noise = torch.randn(len(t), patches.shape[2])
    clean = patches.repeat(READ_DRAWS, 1, 1).flatten(0, 1)
    found = {}
    for count in READ:
        places = torch.rand(patches.shape[:2]).argsort(1)[:, :count]
        known = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, places, True)
        losses = []
        for read in (patches, patches.roll(1, 0)):
            z = generator.backbone(read, known, condition)
            given = z.repeat(READ_DRAWS, 1, 1).flatten(0, 1)
            rows = generator.row_losses(clean, given, t, noise)
            losses.append(float(rows.view(READ_DRAWS, *known.shape).mean(0)[~known].mean()))
        found[count] = losses
    return found


def read(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """What the masked backbones read of known tokens."""
    for run in runs:
        if not run.name.startswith("mar") or "causal" in run.name:
            continue
        export = run.training(arguments.runs).folder(arguments.runs) / "export"
        if not (export / "model.safetensors").exists():
            continue
        model = load(str(export), trust=TRUST).eval()
        assert isinstance(model, ImageGenerator)
        found = reading_of(model, arguments.data)
        kept = read_results(NAME)
        rows = kept.pop("rows")
        reading = {**kept.pop("reading", {}), run.name: found}
        write_results(NAME, rows, **kept, reading=reading)
        print(run.name, *(f"{count}: {a:.3f} ({b:.3f})" for count, (a, b) in found.items()))


def raster_plan(generator: Any) -> Any:
    """A plan of one order for all images."""

    def plan(noise: Noise, steps: int | None = None) -> Any:
        return RasterMAR.plan(generator, noise, steps)

    return plan


def distance_of(row: dict[str, Any]) -> float:
    return next(value for name, value in row["metrics"].items() if name.startswith("FD("))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row of samples each, with losses of the next token where they were asked for."""
    names = [name for name in rows[0]["metrics"] if name.startswith("FD(")]
    titles = ["run", "images seen", names[0], "accuracy"]
    titles += [f"loss behind {count}" for count in (0, 18, 39, 60)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        accuracy = next(
            value for name, value in row["metrics"].items() if name.startswith("accuracy")
        )
        cells = [row["name"], f"{row['training']['samples_seen']:,}"]
        cells += [f"{distance_of(row):.2f}", f"{accuracy:.2f}"]
        losses = dict(zip(KNOWN, row["losses"] or [], strict=bool(row["losses"])))
        for count in (0, 18, 39, 60):
            cells.append(f"{losses[count]:.3f}" if losses else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def train(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """The autoencoder and the generators, one after the other."""
    precise = Training(LATENT.name, LATENT.config, (*BFLOAT16, *LATENT.options))
    precise.make(arguments.runs, arguments.data)
    for run in runs:
        run.training(arguments.runs).make(arguments.runs, arguments.data)


def measure(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Rows of the runs that are not there yet."""
    judge = Judge(arguments)
    order = [row.name for run in RUNS for row in rows_of(run)]
    for run in runs:
        for row in rows_of(run):
            if any(one["name"] == row.name for one in read_results(NAME)["rows"]):
                continue
            found = measured_row(row, arguments, judge)
            # Read now: another process may have measured other rows meanwhile.
            kept = read_results(NAME)
            rows = [*kept.pop("rows"), found]
            rows.sort(key=lambda one: order.index(one["name"]))
            facts = {"images": IMAGES, "known": KNOWN, "updates": UPDATES}
            write_results(NAME, rows, **{**kept, **facts})
            print(table([found]), flush=True)


def look(files: Sequence[str], arguments: argparse.Namespace) -> None:
    """Losses of the next token of generators that are not trained to the end, NAME=FILE each."""
    known = read_results(NAME)
    found = known.setdefault("checkpoints", {})
    for given in files:
        name, _, file = given.partition("=")
        model = load(file, trust=TRUST).eval()
        assert isinstance(model, ImageGenerator)
        found[name] = next_losses(model, arguments.data, count=128, draws=8)
        print(name, *(f"{loss:.3f}" for loss in found[name]), flush=True)
    rows = known.pop("rows")
    write_results(NAME, rows, **known)


def show(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """The table of what was measured."""
    print(table(read_results(NAME)["rows"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all runs, or those named by `--only`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS])
    parser.add_argument("--checkpoints", nargs="+", help="NAME=FILE: losses of these alone")
    steps = {"train": train, "measure": measure, "read": read, "show": show}
    parser.add_argument("--steps", nargs="+", choices=list(steps), default=list(steps))
    arguments = parser.parse_args(argv)
    for name in ("data", "extractor", "runs"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if arguments.checkpoints:
        look(arguments.checkpoints, arguments)
        return
    runs = [run for run in RUNS if arguments.only is None or run.name in arguments.only]
    for step in arguments.steps:
        steps[step](runs, arguments)


if __name__ == "__main__":
    main()
