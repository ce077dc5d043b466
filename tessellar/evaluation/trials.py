"""Short runs of one recipe at several settings (`tessellar sweep`): what each came to, which is best,
and the picture of it.

A run is judged by a metric that it logged, smoothed: its mean over the last share of the updates. One
that diverged is named as such and never chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from tessellar.errors import UserError, writing
from tessellar.evaluation.pictures import columns_of
from tessellar.evaluation.sweep import aligned
from tessellar.protocol.nearest import nearest

Mode = Literal["min", "max"]
Curve = list[tuple[int, float]]  # (update, value)
SHOWN_POINTS = 200  # of a curve, in the JSON and the picture


@dataclass(frozen=True)
class Trial:
    """A run at `values`, as they were given: `value` of the metric, None where the run did not come
    to one; then `fault` says why.
    """

    values: Mapping[str, str]
    run: str
    updates: int
    samples: int | None = None  # that were seen
    value: float | None = None
    fault: str = ""
    curve: tuple[tuple[int, float], ...] = ()

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "values": dict(self.values),
            "run": self.run,
            "updates": self.updates,
            "samples": self.samples,
            "value": self.value,
            "fault": self.fault,
            "curve": [list(pair) for pair in self.curve],
        }


def judged(trial: Trial, metrics: Path, metric: str, mode: Mode, share: float) -> Trial:
    """`trial` with what its `metrics` file says: the smoothed end of `metric`, or that it diverged.

    A run diverged where its end is worse than its beginning, or no number. Raises UserError where the
    run logged no such metric.
    """
    columns = columns_of(metrics, "")
    if metric not in columns:
        hint = nearest(metric, columns, listed=8)
        raise UserError(f"--metric {metric}: {metrics} has no such column{hint}")
    rows = columns[metric]
    curve = smoothed(rows, share, trial.updates)
    value = curve[-1][1]
    shown = thinned([pair for pair in curve if isfinite(pair[1])], SHOWN_POINTS)
    found = replace(trial, curve=tuple(shown))
    if not isfinite(value):
        return replace(found, fault=f"diverged: {metric} is {value} at the end")
    first = rows[0][1]
    worse = value > first if mode == "min" else value < first
    if worse and len(rows) > 1:
        return replace(found, fault=f"diverged: {metric} ended at {value:.4g} after {first:.4g}")
    return replace(found, value=value)


def smoothed(rows: Sequence[tuple[int, float]], share: float, updates: int) -> Curve:
    """At each row the mean of those of the last `share` of all `updates`, itself included."""
    window = share * updates
    curve = []
    first = 0
    for place, (update, _) in enumerate(rows):
        while rows[first][0] <= update - window and first < place:
            first += 1
        values = [value for _, value in rows[first : place + 1]]
        curve.append((update, sum(values) / len(values)))
    return curve


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` rows, evenly, the last one among them."""
    step = max(1, -(-len(curve) // most))
    return curve[::-1][::step][::-1]


def best_trial(trials: Sequence[Trial], mode: Mode) -> Trial:
    """The one with the best value, the first of equal ones; raises UserError where all failed."""
    sign = 1 if mode == "min" else -1
    ended = [trial for trial in trials if trial.value is not None]
    if not ended:
        raise UserError(f"no run came to an end: {trials[0].run}: {trials[0].fault}")
    return min(ended, key=lambda trial: sign * (trial.value or 0.0))


def at_edge(trials: Sequence[Trial], chosen: Trial) -> list[str]:
    """Lines on swept numbers whose best value is the smallest or largest that was tried."""
    lines = []
    for name, value in chosen.values.items():
        numbers = [as_number(trial.values[name]) for trial in trials]
        tried = sorted({number for number in numbers if number is not None})
        number = as_number(value)
        if number is None or len(tried) < 2:
            continue
        if number == tried[-1]:
            lines.append(f"--{name} {value} is the largest that was tried: try larger ones too")
        elif number == tried[0]:
            lines.append(f"--{name} {value} is the smallest that was tried: try smaller ones too")
    return lines


def as_number(text: str) -> float | None:
    """The number that a value is; None for a word."""
    try:
        return float(text)
    except ValueError:
        return None


def table_of(trials: Sequence[Trial], chosen: Trial | None, metric: str) -> str:
    """One line a run, the chosen one marked; what failed says why."""
    rows = [["", *trials[0].values, "updates", "samples", metric]]
    for trial in trials:
        value = trial.fault if trial.value is None else f"{trial.value:.5g}"
        samples = "" if trial.samples is None else f"{trial.samples:,}"
        mark = "*" if trial is chosen else ""
        rows.append([mark, *trial.values.values(), f"{trial.updates:,}", samples, value])
    return aligned(rows)


def rate_of(names: Sequence[str]) -> str:
    """The swept option that is drawn along the axis: a learning rate, else the first."""
    rates = [name for name in names if name.rpartition(".")[2].endswith("lr")]
    return (rates or list(names))[0]


def draw_trials(trials: Sequence[Trial], chosen: Trial, metric: str, out: Path) -> None:
    """A PNG: left the metric over the rate, a line for each combination of the other options, the
    chosen run ringed, failed ones as crosses at the top; right the smoothed curve of each run.
    """
    from matplotlib.figure import Figure

    axis = rate_of(list(trials[0].values))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2)
    lines: dict[str, list[Trial]] = {}
    for trial in trials:
        others = [f"{_last(name)} {value}" for name, value in trial.values.items() if name != axis]
        lines.setdefault(", ".join(others), []).append(trial)
    numbers = [as_number(trial.values[axis]) for trial in trials]
    positions: dict[str, float] = {}
    for place, trial in enumerate(trials):
        number = numbers[place]
        if None in numbers or number is None:
            number = float(len(positions))
        positions.setdefault(trial.values[axis], number)
    ended = [trial.value for trial in trials if trial.value is not None]
    top = max(ended)
    for color, (label, line) in enumerate(lines.items()):
        hue = f"C{color % 10}"
        reached = [trial for trial in line if trial.value is not None]
        reached.sort(key=lambda trial: positions[trial.values[axis]])
        xs = [positions[trial.values[axis]] for trial in reached]
        ys = [trial.value or 0.0 for trial in reached]
        left.plot(xs, ys, marker=".", color=hue, label=label or None)
        failed = [positions[trial.values[axis]] for trial in line if trial.value is None]
        if failed:
            left.plot(failed, [top] * len(failed), "x", color=hue)
        for trial in line:
            if trial.curve:
                style = "-" if trial.value is not None else ":"
                right.plot(*zip(*trial.curve, strict=True), style, color=hue, alpha=0.7)
    left.plot(
        positions[chosen.values[axis]],
        chosen.value or 0.0,
        marker="o",
        markersize=12,
        fillstyle="none",
        color="black",
    )
    if None in numbers:
        left.set_xticks(list(positions.values()), list(positions))
    elif min(positions.values()) > 0:
        left.set_xscale("log")
    left.set_xlabel(axis)
    left.set_title(f"{metric} (cross: diverged or failed)", fontsize=9)
    if any(lines):
        left.legend(fontsize=7)
    right.set_xlabel("updates")
    right.set_title(f"{metric}, smoothed", fontsize=9)
    # The first values of all runs, not the peaks of those that diverged.
    begun = [trial.curve[0][1] for trial in trials if trial.curve]
    low = min(value for trial in trials for _, value in trial.curve)
    right.set_ylim(low - 0.05 * (max(begun) - low), max(begun) + 0.2 * (max(begun) - low) + 1e-9)
    with writing(out, unfinished=out):
        figure.savefig(out, dpi=100)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
