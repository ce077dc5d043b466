"""What each run under configs/ costs: the table of docs/cost.md, made from the YAMLs themselves.

    python benchmarks/costs.py --write docs/cost.md       (replaces what stands between its two marks)
    python benchmarks/costs.py --write docs/cost.md imagenet256/rar_b    (that row alone)

Every model is built at its real size on the meta device. Operations are counted on one image, forward and backward;
memory and GPU-hours are estimates by the formulas of the page. Only `MEASURED` was run.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from tessellar.absent import random_where_absent
from tessellar.cli.dry_run import PROCESSES, SHARE, operations_of, parameters
from tessellar.cli.train import TrainCLI, parse
from tessellar.training.flops import peak_of

ROOT = Path(__file__).resolve().parents[1] / "configs"
HEAD = (
    "| config | trained | frozen | tokens an image | GFLOP an image | memory without activations, GB "
    "| images in all | measured images/s | H100-hours, estimate |\n|---|---|---|---|---|---|---|---|---|"
)
MARKS = "<!-- made by benchmarks/costs.py -->", "<!-- end -->"
GPU = "H100"  # of the estimate of hours
MEASURED = {  # images/s, one thread of a shared CPU core, of the runs in the README
    "fashion_mnist/tokenizer": "199 to 221 (CPU core)",
    "fashion_mnist/generator": "104 to 129 (CPU core)",
}


class Cost(NamedTuple):
    """Facts of one config; None where an operation does not run on the meta device."""

    name: str
    trained: int
    frozen: int
    tokens: int
    flops: int | None
    images: int | None
    counted: bool = True

    @property
    def memory(self) -> float:
        """GB of weights, gradients, two moments of AdamW and averages in float32; activations come on top."""
        return (self.trained * 5 * 4 + self.frozen * 4) / 1e9

    @property
    def gpu_hours(self) -> float | None:
        peak = peak_of(GPU, "bf16-mixed")
        if self.flops is None or self.images is None or peak is None:
            return None
        return self.flops * self.images / (SHARE * peak) / 3600


def build(path: Path) -> TrainCLI:
    """The command line of a YAML on the meta device, without weights from files."""
    fixed = ("--trainer.strategy", "auto", "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    with torch.device("meta"), random_where_absent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse(["--config", str(path), "--name", "x", *fixed])


def cost(path: Path) -> Cost:
    """Build a config and count."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            cli = build(path)
        finally:
            os.chdir(here)
    module = cli.model
    config = yaml.safe_load(path.read_text())
    trained, frozen = parameters(module)
    perceptual = getattr(getattr(module, "loss", None), "perceptual", None)
    if perceptual is not None:
        frozen -= sum(p.numel() for p in perceptual.parameters())
    several = config["trainer"].get("strategy", "auto") != "auto"
    batch = cli.datamodule.batch_size * module.accumulate * (PROCESSES if several else 1)
    steps = config["trainer"].get("max_steps")
    with torch.device("meta"):
        flops, counted = operations_of(module)
    return Cost(
        f"{path.parent.name}/{path.stem}",
        trained,
        frozen,
        module.tokenizer.layout.length,
        flops,
        None if steps is None else steps * batch,
        counted,
    )


def own_models() -> list[Path]:
    """The YAMLs that say a model; an alignment takes its own from an export."""
    found = []
    for path in sorted(ROOT.glob("*/*.yaml")):
        if "source" not in yaml.safe_load(path.read_text())["model"]["init_args"]:
            found.append(path)
    return found


def row(c: Cost) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    hours = c.gpu_hours
    cells = [
        c.name,
        f"{c.trained:,}",
        f"{c.frozen:,}",
        str(c.tokens),
        ("" if c.counted else "~") * (c.flops is not None)
        + shown(c.flops and c.flops / 1e9, ",.4g"),
        f"{c.memory:.2f}",
        shown(c.images, ","),
        MEASURED.get(c.name, ""),
        "" if hours is None else "below 1" if hours < 1 else f"{hours:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def kept(page: str, marks: tuple[str, str] = MARKS) -> dict[str, str]:
    """The rows between two marks of a page, by the config that each is of."""
    inside = page.partition(marks[0])[2].partition(marks[1])[0]
    rows = [
        line for line in inside.splitlines() if line.startswith("| ") and "/" in line.split()[1]
    ]
    return {line.split()[1]: line for line in rows}


def with_rows(
    page: str, rows: dict[str, str], head: str = HEAD, marks: tuple[str, str] = MARKS
) -> str:
    """The page with these rows, sorted, between two of its marks."""
    before, _, rest = page.partition(marks[0])
    _, _, after = rest.partition(marks[1])
    text = "\n".join([head, *(rows[name] for name in sorted(rows))])
    return f"{before}{marks[0]}\n{text}\n{marks[1]}{after}"


def main() -> int:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description="The cost table of every config.")
    parser.add_argument(
        "configs",
        nargs="*",
        help="such as imagenet256/rar_b; the rows of others stay (default: all)",
    )
    parser.add_argument("--write", type=Path, help="a page to put the rows into, between its marks")
    given = parser.parse_args()
    known = {f"{path.parent.name}/{path.stem}": path for path in own_models()}
    for name in given.configs or known:
        if name not in known:
            raise SystemExit(f"{name} is no config: there are {', '.join(known)}")
        made = row(cost(known[name]))
        print(made, flush=True)
        if given.write is not None:  # row by row: what is made stays, whatever comes
            page = given.write.read_text()
            rows = {key: line for key, line in kept(page).items() if key in known}
            given.write.write_text(with_rows(page, {**rows, name: made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
