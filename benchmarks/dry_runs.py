"""Every config of configs/imagenet256 tried at its real size: the second table of docs/cost.md.

    python benchmarks/dry_runs.py --write docs/cost.md [NAME...]     (rows of others stay; default: all that have none)

Each is `train.py --dry_run` in a process of its own: two updates of one image on this machine's processor where
weights, gradients and states of the optimizer need at most LIMIT bytes, else sizes and operations on the meta device.
Seconds are of one thread of a shared core: they say that it runs, not how fast.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from costs import kept, with_rows  # benchmarks/costs.py

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 12e9
MARKS = "<!-- made by benchmarks/dry_runs.py -->", "<!-- end of dry runs -->"
HEAD = (
    "| config | tried on | batch | s an update | peak memory, GB | GFLOP an image |\n"
    "|---|---|---|---|---|---|"
)
RUN = """
import json, logging, sys, warnings
from dataclasses import asdict
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from tessellar.cli import dry_run
from tessellar.cli.train import parse
limit, config = float(sys.argv[1]), sys.argv[2]
real = dry_run.free_memory
dry_run.free_memory = lambda: int(min(real(), limit * dry_run.SPARE))
print("FOUND " + json.dumps(asdict(dry_run.dry_run(lambda: parse(["--config", config, "--name", "x"])))))
"""


def tried(name: str) -> str:
    """The row of a config."""
    with tempfile.TemporaryDirectory() as folder:
        path = ROOT / "configs" / f"{name}.yaml"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "-c", RUN, str(LIMIT), str(path)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    found = [line[6:] for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        raise SystemExit(f"{name} ended with {ended.returncode}: {last}")
    facts = json.loads(found[0])
    operations = facts["operations"]
    gflop = "" if operations is None else f"{operations / 1e9:,.4g}"
    if facts["seconds"] is None:
        return f"| {name} | meta device |  |  |  | {gflop} |"
    return (
        f"| {name} | processor | {facts['batch']} | {facts['seconds']:.1f} "
        f"| {facts['peak_memory'] / 1e9:.2f} | {gflop} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of dry runs.")
    parser.add_argument("configs", nargs="*", help="such as imagenet256/rar_b")
    parser.add_argument("--write", type=Path, help="a page to put the rows into")
    given = parser.parse_args()
    known = sorted((ROOT / "configs" / "imagenet256").glob("*.yaml"))
    names = given.configs or [f"imagenet256/{path.stem}" for path in known]
    for name in names:
        if given.write is not None and not given.configs:
            if name in kept(given.write.read_text(), MARKS):
                continue
        try:
            row = tried(name)
        except SystemExit as failed:
            print(failed, flush=True)
            continue
        print(row, flush=True)
        if given.write is not None:  # row by row: what is made stays, whatever comes
            page = given.write.read_text()
            rows = {**kept(page, MARKS), name: row}
            given.write.write_text(with_rows(page, rows, HEAD, MARKS))


if __name__ == "__main__":
    main()
