"""Generators side by side: network evaluations an image and images a second, decoding included, in one run.

    python benchmarks/sampling_speed.py EXPORT [EXPORT ...] [--batch 1] [--rounds 5] [--guidance 1.25] [--bf16]

Each EXPORT holds a generator with its tokenizer; the first is what the others are compared with. Rounds of all are
interleaved and the fastest of each counts, after one that does not. Generators that draw by a flow take `--flow-steps`
of its ODE. Numbers belong to the machine that made them.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator, load
from tessellar.processes.flow import Euler
from tessellar.protocol.guidance import Constant
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling


def read(path: str) -> ImageGenerator:
    model = load(path)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{path} holds no generator")
    return model.eval()


@torch.no_grad()
def draw(
    model: ImageGenerator, sampling: Sampling, batch: int, recorder: Recorder | None = None
) -> float:
    """Seconds of `batch` images, from their classes to their pixels."""
    condition = model.class_condition([number % 10 for number in range(batch)])
    start = time.perf_counter()
    model.decode(model.sample_tokens(condition, sampling, range(batch), recorder))
    return time.perf_counter() - start


def compare(
    models: dict[str, ImageGenerator], sampling: Sampling, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """A row of each, in order."""
    seconds = dict.fromkeys(models, float("inf"))
    recorders = {name: Recorder() for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            taken = draw(model, sampling, batch, None if number else recorders[name])
            if number:
                seconds[name] = min(seconds[name], taken)
    first, rows = seconds[next(iter(models))], []
    for name, model in models.items():
        report = recorders[name].report()
        rows.append(
            {
                "generator": name,
                "kind": type(model.generator).__name__,
                "parameters": sum(p.numel() for p in model.generator.parameters()),
                "tokens": model.generator.layout.length,
                "evaluations": (report.evaluations + report.solver_evaluations) / batch,
                "images_per_second": batch / seconds[name],
                "times_as_fast": first / seconds[name],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(f"{value:,.2f}" if isinstance(value, float) else f"{value}" for value in row.values())
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exports", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=1.25)
    parser.add_argument("--flow-steps", type=int, default=10)
    parser.add_argument("--bf16", action="store_true", help="of the generator and the tokenizer")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    sampling = Sampling(Constant(given.guidance), flow=Euler(given.flow_steps))
    models = {str(path): read(path) for path in given.exports}
    with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
        rows = compare(models, sampling, given.batch, given.rounds)
    show(rows)
    facts = {
        "batch": given.batch,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "bf16": given.bf16,
    }
    if given.json is not None:
        given.json.write_text(
            json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
