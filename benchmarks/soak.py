"""Kill a training run again and again at random steps: it must end with the very weights of an uninterrupted one.

    python benchmarks/soak.py --kills 20 --folder outputs/soak        (or: make soak)

Every run is `train.py` in a process of its own, ended by SIGKILL from outside, then continued with `--resume auto`. The
processes are forked from a server that has imported the libraries once, so that 20 starts cost little.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

RUN = "killed"


class Report(NamedTuple):
    """What a soak saw: kills and where, updates made again, unfinished checkpoints left behind, tensors compared."""

    updates: int
    kills: int
    killed_at: list[int]
    made_again: int
    left_parts: int
    compared: int
    different: list[str]


def config(updates: int, workers: int = 0) -> dict[str, Any]:
    """A tiny tokenizer with everything that has a state: discriminator, averages, restarted codes, accumulation."""
    tokenizer = {
        "class_path": "tessellar.tokenizers.vit_vq.ViTVQ",
        "init_args": {
            "image_size": 16,
            "width": 16,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "quantizer": {
                "class_path": "tessellar.tokenizers.quantizers.vq.VectorQuantizer",
                "init_args": {"vocab_size": 16, "dim": 4, "init_step": 3, "restart_every": 5},
            },
        },
    }
    critic = {
        "class_path": "tessellar.tokenizers.losses.discriminator.PatchGAN",
        "init_args": {"channels": 8, "depth": 1},
    }
    loss = {
        "class_path": "tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss",
        "init_args": {"discriminator": critic, "adversarial_start": 4},
    }
    return {
        "trainer": {
            "max_steps": updates,
            "accelerator": "cpu",
            "check_val_every_n_epoch": None,
            "val_check_interval": 7,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
        },
        "log_every": 1,
        "save_every": 3,
        "ema": 0.9,
        "model": {
            "class_path": "tessellar.training.tokenizer_module.TokenizerModule",
            "init_args": {
                "tokenizer": tokenizer,
                "loss": loss,
                "accumulate": 2,
                "optimizer": {"name": "muon", "lr": 1e-3},
                "schedule": {"decay": "linear", "warmup": 5},
            },
        },
        "data": {
            "class_path": "tessellar.data.ShapesData",
            "init_args": {
                "size": 16,
                "length": 72,
                "val_length": 16,
                "batch_size": 8,
                "num_workers": workers,
            },
        },
    }


def train(folder: str, name: str) -> None:
    """One process: `train.py --resume auto`, its output in a file of the folder."""
    from tessellar.cli.errors import run
    from tessellar.cli.train import main

    os.chdir(folder)
    with open(f"{name}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(run(lambda: main(["fit", "--config", "run.yaml", "--name", name, "--resume", "auto"])))


def update_of(run: Path) -> int:
    """The update of the last whole line of a run's metrics, 0 before the first."""
    file = run / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.partition(",")[0] for line in lines[1:]]
    return int(found[-1]) if found and found[-1].isdigit() else 0


def start(folder: Path, name: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tessellar.cli.train"])
    process = context.Process(target=train, args=(str(folder), name))
    process.start()
    return process


def finish(process: Any, folder: Path, name: str) -> None:
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(
            f"{name} ended with {process.exitcode}:\n{(folder / f'{name}.log').read_text()[-2000:]}"
        )


def killed_after(process: Any, run: Path, target: int, delay: float) -> int | None:
    """SIGKILL once the run has logged update `target`, and `delay` seconds more have passed; where it was then.

    None where the run ended on its own before that.
    """
    while update_of(run) < target and process.is_alive():
        time.sleep(0.003)
    time.sleep(delay)
    if not process.is_alive():
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return update_of(run)


def soak(folder: Path, kills: int, updates: int, seed: int = 0, workers: int = 0) -> Report:
    """Train once in peace and once under `kills` SIGKILLs, spread at random over the run; compare everything."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config(updates, workers)))
    finish(start(folder, "whole"), folder, "whole")
    rng, run = random.Random(seed), folder / "runs" / RUN
    at: list[int] = []
    again = parts = 0
    for target in sorted(rng.randrange(updates - 2) for _ in range(kills)):
        reached = killed_after(start(folder, RUN), run, target, rng.uniform(0, 0.05))
        if reached is None:
            break
        at.append(reached)
        again += max(0, reached - saved_update(run))
        parts += len(list((run / "checkpoints").glob("*.part")))
    finish(start(folder, RUN), folder, RUN)
    names, different = compare(folder / "runs" / "whole", run)
    return Report(updates, len(at), at, again, parts, len(names), different)


def saved_update(run: Path) -> int:
    """The update that the run would be continued from."""
    from tessellar.training.base import STATE_KEY
    from tessellar.training.runs import Run

    path = Run(run.name, run.parent, resume="auto").checkpoint
    return 0 if path is None else int(torch.load(path, weights_only=True)[STATE_KEY]["updates"])


def compare(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """Names of all tensors of the two last checkpoints (weights, averages, optimizers, random numbers), and of those
    that differ in a bit."""
    first, second = (
        dict(tensors(torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)))
        for p in (a, b)
    )
    different = sorted(first.keys() ^ second.keys())
    different += [
        name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])
    ]
    return sorted(first), different


def tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries and lists, by path."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return [found for key, inner in items for found in tensors(inner, f"{name}/{key}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/soak"), help="must not hold an earlier soak"
    )
    given = parser.parse_args()
    began = time.perf_counter()
    report = soak(given.folder, given.kills, given.updates, given.seed, given.workers)
    print(
        json.dumps({**report._asdict(), "seconds": round(time.perf_counter() - began, 1)}, indent=2)
    )
    return 1 if report.different or report.kills < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
