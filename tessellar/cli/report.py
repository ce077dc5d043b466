"""`tessellar report RUN...`: one HTML file of a run, or of several side by side.

Curves, samples and reconstructions over time, usage of codes, numbers, configs, commands: what the
runs' folders hold, read as it is.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
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
        found = sorted((self.folder / "pictures").glob(f"{kind}_*.png"))
        if len(found) > SHOWN:
            found = [found[round(k * (len(found) - 1) / (SHOWN - 1))] for k in range(SHOWN)]
        return [Picture(path, _update_of(path)) for path in found]

    def others(self) -> list[Picture]:
        """Pictures that are not over time: nearest training images and the like."""
        found = sorted((self.folder / "pictures").glob("*.png"))
        return [Picture(path, path.stem) for path in found if not path.stem.startswith(KINDS)]

    def commands(self) -> list[str]:
        """The command of each part of the run."""
        parts = self.facts.get("parts") or [self.facts]
        return [
            str(part["command"]) for part in parts if isinstance(part, dict) and "command" in part
        ]

    def evaluations(self) -> dict[str, str]:
        """Metrics of the records below `evaluations/`, by file and name."""
        found = {}
        for path in sorted((self.folder / "evaluations").glob("*.json")):
            metrics = _json(path).get("metrics")
            for name, value in metrics.items() if isinstance(metrics, dict) else ():
                found[f"{name} at {path.stem.lstrip('0')}"] = _number(value)
        return found


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
    over_time = []
    for kind in KINDS:
        for run in runs:
            shown = run.pictures(kind)
            over_time += [Strip(_titled(kind, run, runs), shown)] if shown else []
    rest = [Strip(_titled("pictures", run, runs), run.others()) for run in runs if run.others()]
    commands = [text("\n".join(run.commands())) for run in runs if run.commands()]
    configs = [text(run.config, f"config.yaml of {run.name}") for run in runs if run.config]
    return [
        Section("Numbers", table(names, _numbers(runs))),
        Section("What differs", table(names, _differences(runs)) if len(runs) > 1 else ""),
        Section("Curves", _curves(runs, names)),
        Section("Pictures over time", strips(over_time)),
        Section("More pictures", strips(rest)),
        Section("Commands", "".join(commands)),
        Section("Configs", "".join(configs)),
    ]


def _titled(kind: str, run: RunFiles, runs: Sequence[RunFiles]) -> str:
    return kind if len(runs) == 1 else f"{kind} of {run.name}"


def _numbers(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Facts of run.json, then the last and the best of each validation metric, then evaluations."""
    rows: dict[str, list[str]] = {"data": [_data(run) for run in runs]}
    for key in FACTS:
        rows[key.replace("_", " ")] = [_number(run.facts.get(key)) for run in runs]
    metrics = sorted({name for run in runs for name in run.curves if name.startswith("val/")})
    for name in metrics:
        rows[f"{name}, last"] = [_extreme(run, name, "last") for run in runs]
        rows[f"{name}, least and most"] = [_extreme(run, name, "range") for run in runs]
    measured = [run.evaluations() for run in runs]
    for name in sorted({name for one in measured for name in one}):
        rows[name] = [one.get(name, "") for one in measured]
    return {name: cells for name, cells in rows.items() if any(cells)}


def _data(run: RunFiles) -> str:
    data = run.facts.get("data")
    if not isinstance(data, dict):
        return ""
    names = data.get("class_names") or []
    few = ", ".join(in_one_line(str(name)) for name in names[:10])
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{data.get('name')}: {len(names)} classes ({few}{more})"


def _extreme(run: RunFiles, name: str, which: str) -> str:
    points = run.curves.get(name)
    if not points:
        return ""
    if which == "last":
        return f"{points[-1][1]:.5g} (update {points[-1][0]})"
    low = min(points, key=lambda point: point[1])
    high = max(points, key=lambda point: point[1])
    return f"{low[1]:.5g} ({low[0]}), {high[1]:.5g} ({high[0]})"


def _differences(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Settings in which the configs differ, but for how the runs were called."""
    configs = [flat(_yaml(run.config)) for run in runs]
    keys = sorted({key for config in configs for key in config} - {"name", "resume", "config"})
    rows = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    return {key: cells for key, cells in rows.items() if len(set(cells)) > 1}


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    metrics = sorted({name for run in runs for name in run.curves}, key=_place_of)
    drawn = panels({name: [run.curves.get(name, []) for run in runs] for name in metrics})
    return (legend(names) if len(runs) > 1 and drawn else "") + drawn


def _place_of(metric: str) -> tuple[int, str]:
    """Validation first, then the loss and the usage of codes, then the rest."""
    found = [place for place, part in enumerate(ORDER) if part in metric]
    return (min(found, default=len(ORDER)), metric)


def _update_of(path: Path) -> str:
    number = path.stem.rpartition("_")[2]
    return f"update {int(number)}" if number.isdecimal() else path.stem


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(content: str) -> Any:
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `tessellar report`."""
    return run_functions(report, argv, "report")
