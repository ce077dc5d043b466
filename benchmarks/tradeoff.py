"""Decoding algorithms against each other on a trained generator: evaluations an image, time at batch 1, and FD.

    python benchmarks/tradeoff.py MODEL --data DIR --extractor FILE [--guidance 1.5] [--rows REGEX] [--bf16] [--out DIR]

Every row is one algorithm with its options. Its FD comes from `--images` class-balanced samples for each of the seeds,
made in large batches: an image is the same in any batch, and so are its evaluations. Its time comes from `--timed`
images one after the other. Rows are written to `results.json` as they are done and skipped when the script is run
again; `table.md` and `tradeoff.png` are made of whatever is there. `--images 0` measures evaluations and time alone.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from tessellar.data.sets.fashion_mnist import FashionMNIST
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.references import Reference, reference_from
from tessellar.evaluation.sources import DatasetImages, ImageBatch
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import Constant
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder, Report
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import (
    CouplingName,
    GroupedJacobi,
    ReusingJacobi,
    SpeculativeJacobi,
)

# Where the name of a point may stand, in printer's points from it, the nearest first.
PLACES = sorted(
    ((4 + 12 * right, 9 * down) for right in range(-9, 10) for down in range(-14, 15)),
    key=lambda place: (place[0] ** 2 + place[1] ** 2, place),
)
SEED_STEP = 10_000_000  # two runs share no stream where their seeds lie further apart than their numbers of images


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    algorithm: Algorithm = Ancestral()


def all_rows() -> list[Row]:
    """Plain; SJD by window, coupling and initial drafts; GSD by group size, threshold and window; SJD++."""
    rows = [Row("plain")]
    for window in (8, 16, 32, 64):
        rows += [Row(f"sjd {window} {c}", SpeculativeJacobi(window, coupling=c)) for c in COUPLINGS]
        best = SpeculativeJacobi(window, init="uniform", coupling="maximal")
        rows.append(Row(f"sjd {window} maximal uniform", best))
    for init in ("repeat-left", "repeat-up", "argmax-left", "sample-left"):
        rows.append(Row(f"sjd 16 none {init}", SpeculativeJacobi(16, init=init)))
    for size in (3, 5, 10, 14, 25, 50):
        for threshold in (0.05, 0.15, 0.5):
            grouped = GroupedJacobi(group_size=size, p_threshold=threshold, d_threshold=None)
            rows.append(Row(f"gsd 16 G {size} p {threshold}", grouped))
    for window in (8, 32, 64):
        for coupling in COUPLINGS[:2]:
            rows.append(
                Row(
                    f"gsd {window} {coupling}",
                    GroupedJacobi(window, coupling=coupling, d_threshold=None),
                )
            )
    rows += [Row(f"gsd 16 near {q}", GroupedJacobi(d_quantile=q)) for q in (0.05, 0.2)]
    return rows + [Row(f"sjd++ 16 t {t}", ReusingJacobi(threshold=t)) for t in (0.1, 0.5, 1.0)]


COUPLINGS: tuple[CouplingName, ...] = ("none", "maximal", "gumbel")


class RecordedImages(GeneratedImages):
    """Samples of a prepared generator that count what the algorithm does."""

    def __init__(
        self, model: ImageGenerator, count: int, sampling: Sampling, seed: int, bf16: bool
    ) -> None:
        super().__init__(model, count, sampling, seed)
        self.recorder, self.bf16 = Recorder(entropy=True), bf16

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        assert self.labels is not None
        for index in torch.arange(self.count).split(batch_size):
            condition = self.model.class_condition(self.labels[index].tolist())
            seeds = [self.seed + i for i in index.tolist()]
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    tokens = self.sampling.tokens(
                        self.model.generator, condition, seeds, self.recorder
                    )
                yield ImageBatch(to_uint8(self.model.decode(tokens)), index, self.labels[index])


@dataclass(frozen=True)
class Bench:
    """A model, what it is measured by, and how much of it."""

    model: ImageGenerator
    extractor: Extractor | None
    reference: Reference | None
    guidance: float
    temperature: float
    images: int
    timed: int
    seeds: int
    batch_size: int
    bf16: bool

    def measure(self, row: Row) -> dict[str, Any]:
        """Evaluations and seconds an image at batch 1, and FD, class accuracy and evaluations of each seed."""
        sampling = Sampling(Constant(self.guidance), Choice(self.temperature), row.algorithm)
        result: dict[str, Any] = {"name": row.name, "exact": row.algorithm.exact}
        result |= {
            "sampling": sampling.describe(),
            "batch_1": _summary(self._one_by_one(sampling)),
            "seeds": [],
        }
        for number in range(self.seeds if self.images else 0):
            source = RecordedImages(
                self.model, self.images, sampling, (number + 1) * SEED_STEP, self.bf16
            )
            assert self.extractor is not None
            arguments = (source, self.extractor, self.reference)
            record = evaluate_samples(
                *arguments, metrics=("fd", "accuracy"), batch_size=self.batch_size
            )
            result["seeds"].append(
                {"metrics": record["metrics"], **_summary(source.recorder.report())}
            )
        return result

    def _one_by_one(self, sampling: Sampling) -> Report:
        recorder, conditioner = Recorder(entropy=True), self.model.conditioner
        assert isinstance(conditioner, ClassConditioner)
        classes = conditioner.num_classes
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            for i in range(self.timed):
                sampling.tokens(
                    self.model.generator, self.model.class_condition([i % classes]), [i], recorder
                )
        return recorder.report()


def _summary(report: Report) -> dict[str, Any]:
    uncertain = (report.uncertain_tokens or 0, report.uncertain_drafted or 0)
    return {
        "evaluations_per_image": report.evaluations_per_image,
        "tokens_per_evaluation": report.tokens_per_evaluation,
        "tokens_per_evaluation_where_uncertain": uncertain[0] / max(uncertain[0] - uncertain[1], 1),
        "uncertain_share": uncertain[0] / report.tokens,
        "nats_per_token": (report.nats or 0) / report.tokens,
        "seconds_per_image": report.seconds / report.images,
        "network_seconds_per_image": report.network_seconds / report.images,
        "acceptance": report.acceptance,
    }


def fd_of(result: dict[str, Any]) -> list[float]:
    """The Fréchet distance of each seed; empty where it was not measured."""
    return [
        value
        for seed in result["seeds"]
        for name, value in seed["metrics"].items()
        if name.startswith("F")
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row an algorithm; ratios are against the row `plain`."""
    plain = next((r["batch_1"] for r in results if r["name"] == "plain"), None)
    lines = [
        "| algorithm | exact | evaluations | fewer by | where uncertain | seconds | faster by | FD | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        one, distances = result["batch_1"], fd_of(result)
        evaluations = mean(
            [s["evaluations_per_image"] for s in result["seeds"]] or [one["evaluations_per_image"]]
        )
        cells = [result["name"], "yes" if result["exact"] else "no", f"{evaluations:.1f}"]
        cells.append(f"{plain['evaluations_per_image'] / evaluations:.2f}" if plain else "")
        cells.append(f"{one['tokens_per_evaluation_where_uncertain']:.2f}")
        cells.append(f"{one['seconds_per_image']:.3f}")
        cells.append(
            f"{plain['seconds_per_image'] / one['seconds_per_image']:.2f}" if plain else ""
        )
        spread = f" ± {stdev(distances):.2f}" if len(distances) > 1 else ""
        cells.append(f"{mean(distances):.2f}{spread}" if distances else "")
        accuracies = [
            v for s in result["seeds"] for k, v in s["metrics"].items() if "accuracy" in k
        ]
        cells.append(f"{mean(accuracies):.3f}" if accuracies else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def family(result: dict[str, Any]) -> str:
    """The algorithm with its coupling: a colour of the plot."""
    algorithm = result["sampling"]["algorithm"]
    name = algorithm["class_path"].rpartition(".")[2]
    coupling = algorithm["init_args"].get("coupling", "none")
    return name if coupling == "none" else f"{name}, {coupling} coupling"


def mark(result: dict[str, Any]) -> str:
    """What tells the rows of a family apart: window, first drafts, group size and thresholds."""
    words = result["name"].split()[1:]
    return " ".join(word for word in words if word not in COUPLINGS)


class Point(NamedTuple):
    """A row of the plot: its colour's name, what tells it apart, evaluations, FD and its deviation."""

    family: str
    mark: str
    evaluations: float
    distance: float
    spread: float


def points_of(results: list[dict[str, Any]]) -> list[Point]:
    """The rows whose distance was measured."""
    found = []
    for result in results:
        distances = fd_of(result)
        if distances:
            evaluations = mean(seed["evaluations_per_image"] for seed in result["seeds"])
            spread = stdev(distances) if len(distances) > 1 else 0.0
            row = (family(result), mark(result), evaluations, mean(distances), spread)
            found.append(Point(*row))
    return found


def plot(points: list[Point], metric: str, path: Path) -> None:
    """Evaluations an image against the distance `metric`, mean and spread over the seeds, a colour
    a family; its best rows are named.
    """
    figure = Figure(figsize=(10, 6.5))
    axes = figure.subplots()
    named = []
    for name in dict.fromkeys(point.family for point in points):
        chosen = [point for point in points if point.family == name]
        x = [point.evaluations for point in chosen]
        y = [point.distance for point in chosen]
        (line,) = axes.plot(x, y, "o", label=name, markersize=4)
        color = line.get_color()
        spread = [point.spread for point in chosen]
        axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.4)
        for point in chosen:
            better = [
                other
                for other in chosen
                if other.evaluations <= point.evaluations and other.distance < point.distance
            ]
            if not better:
                named.append((point, color))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(LogLocator(base=2, subs=(1.25, 1.5, 1.75)))
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("network evaluations an image")
    axes.set_ylabel(metric)
    axes.legend(loc="upper right")
    put_labels(figure, axes, named, points)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def put_labels(
    figure: Figure, axes: Axes, named: list[tuple[Point, Any]], points: list[Point]
) -> list[Annotation]:
    """Names of points, each at the nearest place around its point where it covers no other name and
    no point, inside the axes; a thin line leads to it.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)  # fixes where points are
    places = axes.transData.transform([(p.evaluations, p.distance) for p in points])
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    inside = axes.get_window_extent(renderer)
    labels = []
    for point, color in sorted(named, key=lambda one: one[0].evaluations):
        label = axes.annotate(
            point.mark,
            (point.evaluations, point.distance),
            xytext=(0, 0),
            textcoords="offset points",
            color=color,
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.6},
        )
        for place in PLACES:
            label.set_position(place)
            label.update_positions(renderer)
            text = Text.get_window_extent(label, renderer).expanded(1.05, 1.15)
            within = inside.x0 < text.x0 and text.x1 < inside.x1 and inside.y0 < text.y0
            if within and not any(text.overlaps(other) for other in taken):
                break
        taken.append(text)
        labels.append(label)
    return labels


def run(bench: Bench, rows: list[Row], out: Path) -> None:
    """Measure the rows that are not in `results.json` yet."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    with prepared(bench.model.generator, torch.bfloat16 if bench.bf16 else None):
        for row in rows:
            if row.name in (r["name"] for r in results):
                continue
            results.append(bench.measure(row))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(table(results).splitlines()[-1], flush=True)
    (out / "table.md").write_text(table(results), encoding="utf-8")
    if any(fd_of(r) for r in results):
        metrics = [name for r in results for seed in r["seeds"] for name in seed["metrics"]]
        metric = next(name for name in metrics if name.startswith("F"))
        plot(points_of(results), metric, out / "tradeoff.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="export of a class-conditional generator")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", help="file of the feature network")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--rows", default="", help="regular expression for names of rows; default: all"
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="the generator in bfloat16; the tokenizer decodes in float32",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tradeoff"))
    arguments = parser.parse_args()
    if arguments.images and not (arguments.data and arguments.extractor):
        parser.error("FD needs --data and --extractor; --images 0 leaves it out")
    model = load(arguments.model)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{arguments.model} is a tokenizer; a generator is needed")
    extractor, reference = None, None
    if arguments.images:
        extractor = load_extractor(arguments.extractor)
        images = DatasetImages(FashionMNIST(arguments.data, "train"), "fashion-mnist", "train")
        reference = reference_from(images, extractor, arguments.out / "cache")
    bench = Bench(
        model,
        extractor,
        reference,
        arguments.guidance,
        arguments.temperature,
        arguments.images,
        arguments.timed,
        arguments.seeds,
        arguments.batch_size,
        arguments.bf16,
    )
    run(bench, [row for row in all_rows() if re.search(arguments.rows, row.name)], arguments.out)


if __name__ == "__main__":
    main()
