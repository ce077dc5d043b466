"""The recorded verification: largest errors of every recorded official output, as `convert.py verify` found them.

    python tools/docs_site/parity.py          # replays tests/golden (minutes) and writes docs/papers/parity.json
    python tools/docs_site/parity.py REPORTS  # the same from a file of what `convert.py verify ... --json` printed

The pages of papers draw it; a test says when a recording has outputs that it does not know, or has lost some.
"""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILE = ROOT / "docs" / "papers" / "parity.json"


@dataclass(frozen=True)
class Compared:
    """One recorded output: its largest error and the tolerance there; both 0 where it must be equal."""

    name: str
    case: str
    error: float
    tolerance: float


@cache
def record() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def compared(system: str) -> list[Compared]:
    """The outputs of a recording, in the order of its file; none where there is no recording."""
    found = record()["systems"].get(system, {})
    return [
        Compared(name, case, error, tolerance)
        for case, outputs in found.items()
        for name, (error, tolerance) in outputs.items()
    ]


def stale() -> list[str]:
    """Recordings whose outputs are not those of the record."""
    wrong = []
    known = record()["systems"]
    for folder in sorted(GOLDEN.iterdir()):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tensors = meta["tensors"].items()
        outputs = {name for name, facts in tensors if facts["role"] == "output"}
        outputs -= set(record()["out_of_scope"].get(folder.name, []))
        if outputs != {output.name for output in compared(folder.name)}:
            wrong.append(folder.name)
    return wrong + sorted(set(known) - {folder.name for folder in GOLDEN.iterdir()})


def made(reports: list[dict[str, Any]], commit: str) -> dict[str, Any]:
    """The record, from what `convert.py verify --json` prints."""
    systems: dict[str, dict[str, dict[str, list[float]]]] = {}
    out_of_scope: dict[str, list[str]] = {}
    for report in reports:
        if not report["passed"]:
            raise SystemExit(f"{report['folder']}: not everything passed; nothing is written")
        cases = systems.setdefault(Path(report["folder"]).name, {})
        for output in report["outputs"]:
            numbers = [float(f"{output[key]:.3g}") for key in ("error", "tolerance")]
            cases.setdefault(output["case"], {})[output["name"]] = numbers
        if report["out_of_scope"]:
            name = Path(report["folder"]).name
            left = {case["case"] for case in report["out_of_scope"]}
            tensors = json.loads((GOLDEN / name / "meta.json").read_text())["tensors"].items()
            out_of_scope[name] = [n for n, facts in tensors if facts["case"] in left]
    import torch

    about = {"commit": commit, "torch": torch.__version__, "processor": platform.machine()}
    return {"command": "python convert.py verify tests/golden/* --json", **about} | {
        "out_of_scope": out_of_scope,
        "systems": systems,
    }


def as_text(record: dict[str, Any]) -> str:
    """JSON with a case of a recording a line."""
    head = {key: value for key, value in record.items() if key != "systems"}
    lines = [json.dumps(head, indent=1)[:-2] + ",", ' "systems": {']
    for system, cases in record["systems"].items():
        rows = [f"   {json.dumps(case)}: {json.dumps(outputs)}" for case, outputs in cases.items()]
        end = "" if system == list(record["systems"])[-1] else ","
        lines += [f"  {json.dumps(system)}: {{", ",\n".join(rows), f"  }}{end}"]
    return "\n".join([*lines, " }", "}", ""])


def main() -> None:
    folders = [str(folder) for folder in sorted(GOLDEN.iterdir())]
    command = [sys.executable, "convert.py", "verify", *folders, "--json"]
    if len(sys.argv) > 1:
        text = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        text = done.stdout
    words = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    record = made(json.loads(text), head.stdout.strip())
    FILE.write_text(as_text(record), encoding="utf-8")


if __name__ == "__main__":
    main()
