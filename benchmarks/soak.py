"""Attack training runs again and again: each must end with the very weights and rows of an uninterrupted one.

    python -m benchmarks.soak --attacks 20 --folder outputs/soak        (or: make soak)

Every run is `train.py` in a process of its own, ended from outside and continued with `--resume auto`: by
SIGKILL, by signals to its whole process group, by Ctrl-C once and twice, by files that may not grow (a full
disk). Some batches of it, and of the uninterrupted one, hold NaN. Kinds of run: a tokenizer with everything
that has a state; a generator on cached tokens, on WebDataset tars, on a Hugging Face data set; two processes.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.attacked import AttackedRun, differing_rows, last_update, rows, start_two
from benchmarks.soak_runs import make_run

RUN = "attacked"
KINDS = ("tokenizer", "cache", "webdataset", "hf", "two")
PORTS = 20000 + os.getpid() % 20000
INTERRUPTIONS = {
    "TERM": signal.SIGTERM,
    "USR1": signal.SIGUSR1,
    "HUP": signal.SIGHUP,
    "Ctrl-C": signal.SIGINT,
}
#: What is done to a run; signals go to its whole process group, but for the first.
ATTACKS = ("KILL", "full disk", "KILL of the group", *INTERRUPTIONS, "Ctrl-C twice")
RESUME = ("--resume", "auto")


class Report(NamedTuple):
    """What a soak saw: attacks and the update each came at, updates made again, unfinished
    checkpoints left behind, tensors and rows compared, what differed, and what was not as promised.
    """

    kind: str
    updates: int
    attacks: list[str]
    made_again: int
    left_parts: int
    tensors: int
    rows: int
    different: list[str]
    broken: list[str]

    @property
    def holds(self) -> bool:
        return not self.different and not self.broken


class Soak:
    """One kind of run under attack in `folder`."""

    def __init__(self, kind: str, folder: Path, updates: int, seed: int, workers: int) -> None:
        self.kind = kind
        self.folder = folder
        self.updates = updates
        self.rng = random.Random(seed)
        self.run = folder / "runs" / RUN
        self.broken: list[str] = []
        self.attacks: list[str] = []
        self.made_again = 0
        self.left_parts = 0
        self._port = PORTS
        make_run(kind, folder, updates, workers)

    def start(self, name: str, largest: int | None = None) -> list[AttackedRun]:
        """The processes of a run, the first one first."""
        if self.kind != "two":
            return [AttackedRun(self.folder, name, RESUME, largest=largest)]
        self._port += 1
        return start_two(self.folder, name, RESUME, self._port, largest=largest)

    def finish(self, name: str) -> None:
        """Start a run and have it go on to its end."""
        for process in self.start(name):
            code, said = process.end()
            if code != 0:
                raise RuntimeError(f"{name} ended with {code}: {said[-5:]}")

    def under_attack(self, attacks: int) -> Report:
        """An uninterrupted run, one under attack, and how they compare."""
        self.finish("whole")
        targets = sorted(self.rng.randrange(self.updates - 2) for _ in range(attacks))
        for number, target in enumerate(targets):
            self.attack(ATTACKS[number % len(ATTACKS)], target)
        self.finish(RUN)
        whole = self.folder / "runs" / "whole"
        names, different = compare(whole, self.run)
        return Report(
            kind=self.kind,
            updates=self.updates,
            attacks=self.attacks,
            made_again=self.made_again,
            left_parts=self.left_parts,
            tensors=len(names),
            rows=len(rows(self.run)),
            different=different + differing_rows(whole, self.run),
            broken=self.broken,
        )

    def attack(self, attack: str, target: int) -> None:
        """Start the run again, wait until it has logged update `target` and a little more, and strike."""
        if attack == "full disk":
            self.fill_the_disk()
            return
        processes = self.start(RUN)
        struck = processes[self.rng.randrange(len(processes))]
        if not processes[0].wait_for(target):
            self.broken.append(f"{attack}: the run ended by itself before update {target}")
        time.sleep(self.rng.uniform(0, 0.05))
        at = last_update(self.run)
        strike(attack, struck, processes)
        ends = [process.end() for process in processes]
        self.attacks.append(f"{attack} at {at}")
        self.left_parts += len(list((self.run / "checkpoints").glob("*.part")))
        saved = saved_update(self.run)
        self.made_again += max(0, last_update(self.run) - saved)
        for process, (code, said) in zip(processes, ends, strict=True):
            self.check_end(attack, process is struck, code, said, saved)

    def check_end(self, attack: str, struck: bool, code: int, said: list[str], saved: int) -> None:
        """Note where the exit code or the lines on stderr are not the promised ones."""
        if attack in INTERRUPTIONS:
            number = INTERRUPTIONS[attack]
            expected = (128 + number, saved_lines(number, saved))
            others = (128 + number, [])
        elif attack == "Ctrl-C twice":  # the second one may come after the save
            number = signal.SIGINT
            if said == saved_lines(number, saved):
                return
            expected = (130, ["SIGINT: left without saving"])
            others = (130, [])
        else:
            expected = (-signal.SIGKILL, [])
            then = "continue with --resume auto" if saved else "nothing was saved"
            others = (2, [f"error: another process of this run has ended; {then}"])
            # Struck before the two had met: nothing tells the other one, but for the time it waits.
            waited = "error: not all of the 2 processes of this run came within"
            if not struck and code == 2 and len(said) == 1 and said[0].startswith(waited):
                return
        if (code, said) in ((0, []), expected) or (not struck and (code, said) == others):
            return
        if self.kind == "two" and (code, said) in (expected, others):
            return  # the first process speaks, whichever was struck
        self.broken.append(f"{attack}: ended with {code} and said {said}")

    def fill_the_disk(self) -> None:
        """No file may grow to the size of a checkpoint: the next save fails, in one line."""
        whole = self.folder / "runs" / "whole" / "checkpoints" / "last.ckpt"
        before = saved_update(self.run)
        processes = self.start(RUN, largest=int(0.7 * whole.stat().st_size))
        ends = [process.end() for process in processes]
        self.attacks.append(f"full disk at {last_update(self.run)}")
        for code, said in ends:
            if (code, said, before) == (0, [], self.updates):
                continue  # all was saved before
            if code != 2 or len(said) != 1 or "could not be written" not in said[0]:
                self.broken.append(f"full disk: ended with {code} and said {said}")
        if saved_update(self.run) != before or list((self.run / "checkpoints").glob("*.part")):
            self.broken.append("full disk: something else than the last checkpoint is left")


def saved_lines(number: int, update: int) -> list[str]:
    name = signal.Signals(number).name
    return [f"{name}: saved and stopped after update {update}; continue with --resume auto"]


def strike(attack: str, struck: AttackedRun, processes: list[AttackedRun]) -> None:
    """Do it: a signal to a scheduler's job and Ctrl-C reach all processes."""
    if attack == "KILL":
        struck.signal(signal.SIGKILL)
    elif attack == "KILL of the group":
        struck.signal(signal.SIGKILL, group=True)
    elif attack == "Ctrl-C twice":
        for _ in range(2):
            for process in processes:
                process.signal(signal.SIGINT, group=True)
            time.sleep(0.01)
    else:
        for process in processes:
            process.signal(INTERRUPTIONS[attack], group=True)


def saved_update(run: Path) -> int:
    """The update that the run would be continued from."""
    from tessellar.training.base import STATE_KEY
    from tessellar.training.runs import Run

    path = Run(run.name, run.parent, resume="auto").checkpoint
    return 0 if path is None else int(torch.load(path, weights_only=True)[STATE_KEY]["updates"])


def compare(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """Names of all tensors of the two last checkpoints (weights, averages, optimizers, random
    numbers), and of those that differ in a bit.
    """
    first, second = (
        dict(tensors(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)))
        for run in (a, b)
    )
    different = sorted(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        if not torch.equal(first[name], second[name]):
            different.append(name)
    return sorted(first), different


def tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries and lists, by path."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    found = []
    for key, inner in items:
        found += tensors(inner, f"{name}/{key}")
    return found


def soak(
    folder: Path,
    attacks: int,
    updates: int,
    kind: str = "tokenizer",
    seed: int = 0,
    workers: int = 0,
) -> Report:
    """Train once in peace and once under `attacks`, spread at random over the run; compare everything."""
    return Soak(kind, folder, updates, seed=seed, workers=workers).under_attack(attacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--attacks", type=int, default=20, help="on each kind of run")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/soak"), help="must not hold an earlier soak"
    )
    given = parser.parse_args()
    failed = False
    for kind in given.kinds:
        if kind == "hf" and find_spec("datasets") is None:
            print("hf: not run, the package datasets is not installed (pip install datasets)")
            continue
        began = time.perf_counter()
        report = soak(
            given.folder / kind,
            given.attacks,
            given.updates,
            kind=kind,
            seed=given.seed,
            workers=given.workers,
        )
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({**report._asdict(), "seconds": seconds}), flush=True)
        failed = failed or not report.holds
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
