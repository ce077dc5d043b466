"""A sweep: one generator measured at several sampling settings on one set of seeds, the best chosen,
and measured again on other seeds. Numbers at the chosen settings on the seeds they were chosen by
are too good; those of the last step are the ones to report.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessellar.data.dataset import digest
from tessellar.distributed import barrier, broadcast, rank
from tessellar.errors import UserError, writing
from tessellar.evaluation.record import Record, read_record, write_record

NOT_BETTER_WHEN_LOW = (
    "IS",
    "precision",
    "recall",
    "density",
    "coverage",
    "accuracy",
    "PSNR",
    "SSIM",
)


@dataclass(frozen=True)
class Point:
    """Settings of a sweep: `values` by the name of what is swept, as they were given."""

    values: dict[str, Any]
    record: Record

    def metric(self, name: str) -> float:
        return self.record["metrics"][name]


def higher_is_better(metric: str) -> bool:
    return metric.split("(")[0].split("-")[0].removesuffix(" std") in NOT_BETTER_WHEN_LOW


def best_of(points: Sequence[Point], metric: str) -> Point:
    """The point with the best `metric`, the first of equal ones; raises UserError where none has it."""
    known = list(points[0].record["metrics"])
    if metric not in known:
        raise UserError(f"--choose {metric!r} was not measured; there are {', '.join(known)}")
    sign = -1 if higher_is_better(metric) else 1
    return min(points, key=lambda point: sign * point.metric(metric))


def kept_record(folder: Path, key: dict[str, Any], measure: Callable[[], Record]) -> Record:
    """What `measure` gives, kept in `folder` under what it depends on: a sweep that was interrupted
    goes on where it was. All ranks call it.
    """
    path = folder / f"{digest(**key)}.json"
    known = None
    if rank() == 0 and path.is_file():
        known = read_record(path)
    known = broadcast(known)
    if known is not None:
        return known
    record = measure()
    if rank() == 0:
        write_record(record, path)
    barrier()
    return record


def table(points: Sequence[Point], chosen: Point, metrics: Sequence[str]) -> str:
    """One line a point, the chosen one marked."""
    names = [*points[0].values, *metrics]
    rows = [["", *names]]
    for point in points:
        mark = "*" if point is chosen else ""
        cells = [str(value) for value in point.values.values()]
        rows.append([mark, *cells, *[f"{point.metric(name):.5g}" for name in metrics]])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, columns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw(points: Sequence[Point], chosen: Point, metrics: Sequence[str], out: Path) -> None:
    """A panel a metric over the first swept setting, a line for each combination of the others, the
    chosen point ringed; a PNG.
    """
    from matplotlib.figure import Figure

    axis, *others = list(points[0].values)
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    for place, metric in enumerate(metrics, start=1):
        panel = figure.add_subplot(1, len(metrics), place)
        lines: dict[str, list[tuple[Any, float]]] = {}
        for point in points:
            label = ", ".join(f"{name} {point.values[name]}" for name in others)
            lines.setdefault(label, []).append((point.values[axis], point.metric(metric)))
        for label, line in lines.items():
            panel.plot(*zip(*line, strict=True), marker=".", label=label or None)
        where = (chosen.values[axis], chosen.metric(metric))
        panel.plot(*where, marker="o", markersize=12, fillstyle="none", color="black")
        panel.set_xlabel(axis)
        panel.set_title(metric, fontsize=9)
        if others:
            panel.legend(fontsize=7)
    with writing(out, unfinished=out):
        figure.savefig(out, dpi=100)


def write_summary(
    path: Path, points: Sequence[Point], chosen: Point, final: Record, more: dict[str, Any]
) -> None:
    """All points, the chosen one and the numbers to report, as JSON."""
    rows = []
    for point in points:
        record = point.record
        rows.append(
            {
                "values": point.values,
                "metrics": record["metrics"],
                "sampling": record["samples"].get("sampling"),
                "fingerprint": record["fingerprint"],
            }
        )
    content = {
        **more,
        "points": rows,
        "chosen": chosen.values,
        "final": {"metrics": final["metrics"], "fingerprint": final["fingerprint"]},
    }
    with writing(path, unfinished=path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
