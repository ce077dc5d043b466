"""`tessellar report RUN...`: one HTML file of a run, or of several side by side.

Curves, samples and reconstructions over time, usage of codes, numbers, configs, commands: what the
runs' folders hold, read as it is.
"""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from tessellar.cli.functions import run_functions
from tessellar.cli.report_page import (
    Picture,
    Points,
    Section,
    Strip,
    legend,
    page,
    panels,
    strips,
    table,
    text,
)
from tessellar.errors import UserError, in_one_line, writing
from tessellar.evaluation.pictures import columns_of
from tessellar.training.continuing import CONFIG, flat

REPORT = "report.html"
OF_SEVERAL = "outputs/report.html"
SHOWN = 6  # pictures of a kind over time
KINDS = ("samples", "reconstructions")
ORDER = ("val/", "train/loss", "usage", "train/", "speed/")
Column = dict[str, str]  # what one run has in each row of a table
FACTS = ("updates", "samples_seen", "precision", "devices", "wall_seconds", "cpu_seconds", "commit")


class RunFiles:
    """What the folder of a run holds; whatever is missing or cannot be read is left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.facts = _json(folder / "run.json")
        self.config = _text(folder / CONFIG)
        self.curves: dict[str, Points] = {}
        with suppress(UserError):  # a run that has not logged anything, or a file that was changed
            self.curves = dict(columns_of(folder / "metrics.csv", ""))

    def pictures(self, kind: str) -> list[Picture]:
        """Pictures `<kind>_<update>.png`, SHOWN of them evenly in time, the first and the last
        among them.
        """
        paths = sorted((self.folder / "pictures").glob(f"{kind}_*.png"))
        if len(paths) > SHOWN:
            paths = [paths[round(k * (len(paths) - 1) / (SHOWN - 1))] for k in range(SHOWN)]
        found = []
        for path in paths:
            number = path.stem.rpartition("_")[2]
            caption = f"update {int(number)}" if number.isdecimal() else path.stem
            found.append(Picture(path, caption))
        return found

    def others(self) -> list[Picture]:
        """Pictures that are not over time: nearest training images and the like."""
        found = []
        for path in sorted((self.folder / "pictures").glob("*.png")):
            if not path.stem.startswith(KINDS):
                found.append(Picture(path, path.stem))
        return found

    def commands(self) -> list[str]:
        """The command of each part of the run."""
        found = []
        parts = self.facts.get("parts")
        for part in parts if isinstance(parts, list) and parts else [self.facts]:
            if isinstance(part, dict) and "command" in part:
                found.append(str(part["command"]))
        return found

    def numbers(self) -> Column:
        """Facts of run.json, and the classes of the data by name."""
        column = {"data": ""}
        data = self.facts.get("data")
        if isinstance(data, dict):
            names = data.get("class_names")
            names = names if isinstance(names, list) else []
            few = ", ".join(in_one_line(str(name)) for name in names[:10])
            more = f", and {len(names) - 10} more" if len(names) > 10 else ""
            column["data"] = f"{data.get('name')}: {len(names)} classes ({few}{more})"
        for key in FACTS:
            column[key.replace("_", " ")] = _number(self.facts.get(key))
        return column

    def validation(self) -> Column:
        """The last, the least and the most of each validation metric."""
        column = {}
        for name, points in self.curves.items():
            if not name.startswith("val/") or not points:
                continue
            update, last = points[-1]
            column[f"{name}, last"] = f"{last:.5g} (update {update})"
            low = min(points, key=lambda point: point[1])
            high = max(points, key=lambda point: point[1])
            extremes = f"{low[1]:.5g} ({low[0]}), {high[1]:.5g} ({high[0]})"
            column[f"{name}, least and most"] = extremes
        return column

    def evaluations(self) -> Column:
        """Metrics of the records below `evaluations/`, by file and name."""
        column = {}
        for path in sorted((self.folder / "evaluations").glob("*.json")):
            metrics = _json(path).get("metrics")
            for name, value in metrics.items() if isinstance(metrics, dict) else ():
                column[f"{name} at {path.stem.lstrip('0')}"] = _number(value)
        return column

    def settings(self) -> Column:
        """Settings of the config but for those of how the run was called."""
        try:
            content = flat(yaml.safe_load(self.config))
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}
        return {key: str(content[key]) for key in content.keys() - {"name", "resume", "config"}}


def report(runs: list[str], out: str = "") -> None:
    """Write one HTML file of a run, or of several side by side.

    Args:
        runs: folders of runs, such as runs/shapes-generator
        out: file to write (default: report.html in the run's folder; of several outputs/report.html)
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    default = folders[0] / REPORT if len(folders) == 1 else Path(OF_SEVERAL)
    print(f"wrote {write_report(folders, Path(out) if out else default)}")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """The report of these runs in `out`; returns its path."""
    runs = [RunFiles(folder) for folder in folders]
    content = page(", ".join(run.name for run in runs), sections(runs))
    with writing(out, unfinished=out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(content, encoding="utf-8", errors="backslashreplace")
    return out


def sections(runs: Sequence[RunFiles]) -> list[Section]:
    """All parts of the page, in order."""
    names = [run.name for run in runs]
    numbers = side_by_side([run.numbers() for run in runs])
    validation = side_by_side([run.validation() for run in runs])
    evaluations = side_by_side([run.evaluations() for run in runs])
    rows = numbers | dict(sorted(validation.items())) | dict(sorted(evaluations.items()))
    over_time = []
    for kind in KINDS:
        over_time += [Strip(_titled(kind, run, runs), run.pictures(kind)) for run in runs]
    others = [Strip(_titled("pictures", run, runs), run.others()) for run in runs]
    commands = ""
    configs = ""
    for run in runs:
        if run.commands():
            commands += text("\n".join(_in_lines(command) for command in run.commands()))
        if run.config:
            configs += text(run.config, f"config.yaml of {run.name}")
    return [
        Section("Numbers", table(names, rows)),
        Section("What differs", table(names, differences(runs))),
        Section("Curves", _curves(runs, names)),
        Section("Pictures over time", strips(over_time)),
        Section("More pictures", strips(others)),
        Section("Commands", commands),
        Section("Configs", configs),
    ]


def side_by_side(columns: Sequence[Column]) -> dict[str, list[str]]:
    """Rows by name, with a cell of each column; a row without any content is left out."""
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys(chain.from_iterable(columns)):
        cells = [column.get(name, "") for column in columns]
        if any(cells):
            rows[name] = cells
    return rows


def differences(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Settings in which the configs differ, but for options of classes that not all runs have."""
    settings = [run.settings() for run in runs]
    rows = {}
    for key, cells in sorted(side_by_side(settings).items()):
        if len(set(cells)) > 1:
            rows[key] = cells
    others = [key.removesuffix("class_path") for key in rows if key.endswith(".class_path")]
    shared = {}
    for key, cells in rows.items():
        of_others = any(key.startswith(other) and key != f"{other}class_path" for other in others)
        if not of_others or all(key in config for config in settings):
            shared[key] = cells
    return shared


def _in_lines(command: str, width: int = 110) -> str:
    """A command over lines of about `width` that a shell takes for one; words stay whole."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # a quote that is not closed
        return command
    lines = words[:1]
    for word in words[1:]:
        if word.startswith("--") and len(lines[-1]) > width / 2:
            lines.append("   ")  # an option stays beside its value
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _titled(kind: str, run: RunFiles, runs: Sequence[RunFiles]) -> str:
    return kind if len(runs) == 1 else f"{kind} of {run.name}"


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Validation first, then the loss and the usage of codes, then the rest (ORDER)."""
    ranked = []
    for metric in set(chain.from_iterable(run.curves for run in runs)):
        rank = next((place for place, part in enumerate(ORDER) if part in metric), len(ORDER))
        ranked.append((rank, metric))
    curves = {metric: [run.curves.get(metric, []) for run in runs] for _, metric in sorted(ranked)}
    drawn = panels(curves)
    return (legend(names) if len(runs) > 1 and drawn else "") + drawn


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `tessellar report`."""
    return run_functions(report, argv, "report")
