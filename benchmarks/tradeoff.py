"""Decoding algorithms against each other on a trained generator: evaluations an image, time at batch 1, and FD.

    python benchmarks/tradeoff.py MODEL --data DIR --extractor FILE [FILE] [--guidance 1.5] [--rows REGEX] [--bf16]
        [--drafter EXPORT] [--out DIR]

Every row is one algorithm with its options; those that a generator refuses are named and left out. Its FD comes from
`--images` class-balanced samples for each of the seeds, made in large batches: an image is the same in any batch, and
so are its evaluations. Its time comes from `--timed` images one after the other, by the clock and in CPU-seconds, which
a machine that does other work does not lengthen as much. FLASH has a row where a `--drafter` of the generator is given.

Rows are written to `results.json` as they are done and skipped when the script is run again; `table.md` (exact and
approximate algorithms apart) and `tradeoff.png` (the same, and the best of the approximate ones as one curve) are made
of whatever is there. `--images 0` measures evaluations and time alone.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
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
from tessellar.evaluation.engine import Yardstick, evaluate
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.references import reference_from
from tessellar.evaluation.sources import DatasetImages, ImageBatch
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import Constant
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.flash import FlashDrafts, load_drafter
from tessellar.sampling.parallel_jacobi import ParallelJacobi
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder, Report
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import (
    CouplingName,
    GroupedJacobi,
    ReusingJacobi,
    SiblingJacobi,
    SpeculativeJacobi,
)
from tessellar.sampling.zipar import ZipAR

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


def all_rows(drafter: str | None = None) -> list[Row]:
    """Plain; SJD by window, coupling, initial drafts and siblings; FLASH with the export `drafter`; GSD by group size,
    threshold and window; SJD++; ZipAR by window, PJD by coverage; numbers of steps of generators of random order.
    """
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
    rows += [Row(f"sjd++ 16 t {t}", ReusingJacobi(threshold=t)) for t in (0.1, 0.5, 1.0)]
    for window in (8, 16, 32):
        for count in (2, 4):
            siblings = SiblingJacobi(window, siblings=count)
            rows.append(Row(f"siblings {window} x {count}", siblings))
    if drafter is not None:
        rows.append(Row(f"flash {load_drafter(drafter).drafts} drafts", FlashDrafts(drafter)))
    rows += [Row(f"zipar {window}", ZipAR(window)) for window in (8, 4, 2, 1)]
    for window, coverage in ((16, 0.75), (16, 0.5), (16, 0.25), (32, 0.5)):
        rows.append(Row(f"pjd {window} c {coverage}", ParallelJacobi(window, coverage)))
    return rows + [Row(f"steps {steps}", Ancestral(steps)) for steps in (8, 12, 20)]


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
    yardsticks: tuple[Yardstick, ...]
    guidance: float
    temperature: float
    images: int
    timed: int
    seeds: int
    batch_size: int
    bf16: bool

    def sampling(self, row: Row) -> Sampling:
        return Sampling(Constant(self.guidance), Choice(self.temperature), row.algorithm)

    def refusal(self, row: Row) -> str | None:
        """Why the generator cannot be decoded so, or None; draws an image, which warms up."""
        try:
            self._draw([0], self.sampling(row), Recorder())
        except UserError as error:
            return str(error)
        return None

    def measure(self, row: Row) -> dict[str, Any]:
        """Evaluations and seconds an image at batch 1, and FD, class accuracy and evaluations of each seed."""
        sampling = self.sampling(row)
        result: dict[str, Any] = {
            "name": row.name,
            "exact": row.algorithm.exact,
            "generator": type(self.model.generator).__name__,
            "sampling": sampling.describe(),
            "batch_1": self._one_by_one(sampling),
            "seeds": [],
        }
        for number in range(self.seeds if self.images else 0):
            first = (number + 1) * SEED_STEP
            source = RecordedImages(self.model, self.images, sampling, first, self.bf16)
            record = evaluate(
                source, self.yardsticks, metrics=("fd", "accuracy"), batch_size=self.batch_size
            )
            summary = _summary(source.recorder.report())
            result["seeds"].append({"metrics": record["metrics"], **summary})
        return result

    def _one_by_one(self, sampling: Sampling) -> dict[str, float]:
        recorder = Recorder(entropy=True)
        started = time.process_time()
        self._draw(range(self.timed), sampling, recorder)
        seconds = time.process_time() - started
        return {**_summary(recorder.report()), "cpu_seconds_per_image": seconds / self.timed}

    def _draw(self, images: Sequence[int], sampling: Sampling, recorder: Recorder) -> None:
        conditioner = self.model.conditioner
        assert isinstance(conditioner, ClassConditioner)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            for image in images:
                condition = self.model.class_condition([image % conditioner.num_classes])
                sampling.tokens(self.model.generator, condition, [image], recorder)


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


SECTIONS = ("exact", "approximate", "learned")


def section(result: dict[str, Any]) -> str:
    """Which of SECTIONS a row belongs to; `learned` are the numbers of steps that a generator was trained for."""
    algorithm = result["sampling"]["algorithm"]["init_args"]
    if algorithm.get("steps") is not None:
        return "learned"
    return "exact" if result["exact"] else "approximate"


def distances_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the Fréchet distances that were measured, the first network's first."""
    names = [
        name
        for result in results
        for seed in result["seeds"]
        for name in seed["metrics"]
        if name.startswith("F")
    ]
    return list(dict.fromkeys(names))


def values_of(result: dict[str, Any], name: str) -> list[float]:
    """A metric of each seed; empty where it was not measured."""
    return [seed["metrics"][name] for seed in result["seeds"] if name in seed["metrics"]]


def evaluations_of(result: dict[str, Any]) -> float:
    """Evaluations an image: of the images that were measured, or of the timed ones."""
    measured = [seed["evaluations_per_image"] for seed in result["seeds"]]
    return mean(measured or [result["batch_1"]["evaluations_per_image"]])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row an algorithm, exact ones, approximate ones and learned steps apart; ratios are against the
    row `plain`, those of time by CPU-seconds.
    """
    distances = distances_of(results)
    titles = ["evaluations", "fewer by", "where uncertain", "seconds", "CPU-seconds", "faster by"]
    titles += [*distances, "accuracy"]
    tables = []
    for name in SECTIONS:
        chosen = [result for result in results if section(result) == name]
        if chosen:
            lines = [f"| {name} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
            lines += [line_of(result, results, distances) for result in chosen]
            tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def line_of(
    result: dict[str, Any], results: Sequence[dict[str, Any]], distances: Sequence[str]
) -> str:
    """A row's line of the table."""
    plain = next((one for one in results if one["name"] == "plain"), None)
    one = result["batch_1"]
    evaluations = evaluations_of(result)
    seconds = one["cpu_seconds_per_image"]
    fewer = f"{evaluations_of(plain) / evaluations:.2f}" if plain else ""
    faster = f"{plain['batch_1']['cpu_seconds_per_image'] / seconds:.2f}" if plain else ""
    uncertain = f"{one['tokens_per_evaluation_where_uncertain']:.2f}"
    cells = [result["name"], f"{evaluations:.1f}", fewer, uncertain]
    cells += [f"{one['seconds_per_image']:.3f}", f"{seconds:.3f}", faster]
    for name in distances:
        found = values_of(result, name)
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        cells.append(f"{mean(found):.2f}{spread}" if found else "")
    named = [name for seed in result["seeds"] for name in seed["metrics"] if "accuracy" in name]
    cells.append(f"{mean(values_of(result, named[0])):.3f}" if named else "")
    return f"| {' | '.join(cells)} |"


def family(result: dict[str, Any]) -> str:
    """The algorithm with its coupling: a colour of the plot."""
    algorithm = result["sampling"]["algorithm"]
    if section(result) == "learned":
        return f"{result['generator']}, learned steps"
    name = algorithm["class_path"].rpartition(".")[2]
    coupling = algorithm["init_args"].get("coupling", "none")
    return name if coupling == "none" else f"{name}, {coupling} coupling"


def mark(result: dict[str, Any]) -> str:
    """What tells the rows of a family apart: window, first drafts, group size and thresholds."""
    words = result["name"].split()[1:]
    return " ".join(word for word in words if word not in COUPLINGS)


class Point(NamedTuple):
    """A row of the plot: its part of the table, its colour's name, what tells it apart, evaluations, FD and its
    deviation.
    """

    section: str
    family: str
    mark: str
    evaluations: float
    distance: float
    spread: float


def points_of(results: Sequence[dict[str, Any]], metric: str) -> list[Point]:
    """The rows whose distance `metric` was measured."""
    found = []
    for result in results:
        distances = values_of(result, metric)
        if distances:
            spread = stdev(distances) if len(distances) > 1 else 0.0
            row = (section(result), family(result), mark(result), evaluations_of(result))
            found.append(Point(*row, mean(distances), spread))
    return found


def best_of(points: Sequence[Point]) -> list[Point]:
    """Those of which no other one has a smaller distance at as many evaluations or fewer; by evaluations."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.evaluations, one.distance)):
        if not best or point.distance < best[-1].distance:
            best.append(point)
    return best


def plot(points: Sequence[Point], metric: str, path: Path) -> None:
    """Evaluations an image against the distance `metric`, mean and spread over the seeds, a colour a family: exact
    algorithms on the left, on the right approximate ones with a curve through the best, and learned steps.

    The band is plain decoding's distance. The best rows of a family are named, and all learned steps.
    """
    figure = Figure(figsize=(14, 6.5))
    left, right = figure.subplots(1, 2, sharey=True)
    exact = [point for point in points if point.section == "exact"]
    others = [point for point in points if point.section != "exact"]
    named = [put_points(left, exact), put_points(right, others)]
    approximate = best_of([point for point in others if point.section == "approximate"])
    x = [point.evaluations for point in approximate]
    y = [point.distance for point in approximate]
    right.plot(x, y, color="0.5", linewidth=0.8, zorder=1, label="best approximate")
    plain = next((point for point in exact if point.family == "Ancestral"), None)
    for panel, chosen in ((left, exact), (right, others)):
        if not chosen:  # an empty axis has no logarithm
            continue
        if plain is not None:
            least = plain.distance - plain.spread
            most = plain.distance + plain.spread
            panel.axhspan(least, most, color="0.92", zorder=0, label="plain decoding")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_locator(LogLocator(base=2, subs=(1.5,)))
        panel.xaxis.set_minor_formatter("{x:.0f}")
        panel.set_xlabel("network evaluations an image")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    left.set_title("exact")
    right.set_title("approximate, and learned steps")
    left.set_ylabel(metric)
    # Names find their places when nothing moves any more.
    put_labels(figure, left, named[0], exact)
    put_labels(figure, right, named[1], others)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def put_points(axes: Axes, points: Sequence[Point]) -> list[tuple[Point, Any]]:
    """Draws points, a colour a family; returns those that are to be named, with their colours."""
    named = []
    for name in dict.fromkeys(point.family for point in points):
        chosen = [point for point in points if point.family == name]
        x = [point.evaluations for point in chosen]
        y = [point.distance for point in chosen]
        (line,) = axes.plot(x, y, "o", label=name, markersize=4)
        color = line.get_color()
        spread = [point.spread for point in chosen]
        axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.4)
        shown = chosen if chosen[0].section == "learned" else best_of(chosen)
        named += [(point, color) for point in shown]
    return named


def put_labels(
    figure: Figure, axes: Axes, named: Sequence[tuple[Point, Any]], points: Sequence[Point]
) -> list[Annotation]:
    """Names of points, each at the nearest place around its point where it covers no other name and
    no point, inside the axes; a thin line leads to it.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)  # fixes where points are
    if not points:
        return []
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


def run(bench: Bench, rows: Sequence[Row], out: Path) -> None:
    """Measure the rows that are not in `results.json` yet."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = [result["name"] for result in results]
    with prepared(bench.model.generator, torch.bfloat16 if bench.bf16 else None):
        for row in rows:
            if row.name in known:
                continue
            refusal = bench.refusal(row)
            if refusal is not None:
                print(f"{row.name} is left out: {refusal}", flush=True)
                continue
            results.append(bench.measure(row))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(line_of(results[-1], results, distances_of(results)), flush=True)
    (out / "table.md").write_text(table(results), encoding="utf-8")
    distances = distances_of(results)
    if distances:
        plot(points_of(results, distances[0]), distances[0], out / "tradeoff.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="export of a class-conditional generator")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", nargs="+", help="files of the feature networks")
    parser.add_argument("--drafter", help="export of FLASH's drafter of this generator")
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
    parser.add_argument("--cache", type=Path, help="of references (default: in --out)")
    arguments = parser.parse_args()
    if arguments.images and not (arguments.data and arguments.extractor):
        parser.error("FD needs --data and --extractor; --images 0 leaves it out")
    model = load(arguments.model)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{arguments.model} is a tokenizer; a generator is needed")
    yardsticks = []
    for file in arguments.extractor if arguments.images else ():
        extractor = load_extractor(file)
        images = DatasetImages(FashionMNIST(arguments.data, "train"), "fashion-mnist", "train")
        cache = arguments.cache or arguments.out / "cache"
        yardsticks.append(Yardstick(extractor, reference_from(images, extractor, cache)))
    bench = Bench(
        model,
        tuple(yardsticks),
        guidance=arguments.guidance,
        temperature=arguments.temperature,
        images=arguments.images,
        timed=arguments.timed,
        seeds=arguments.seeds,
        batch_size=arguments.batch_size,
        bf16=arguments.bf16,
    )
    rows = [row for row in all_rows(arguments.drafter) if re.search(arguments.rows, row.name)]
    run(bench, rows, arguments.out)


if __name__ == "__main__":
    main()
