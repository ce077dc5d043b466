"""What studies share: steps that are skipped where their result is there, and small exports.

A study trains and measures by the commands that everybody has (`train.py`, `evaluate.py`), each in
a process of its own. A run that was interrupted is continued from its last checkpoint, so a study
that was ended by a signal is started again by the same command.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.tensor_files import read_safetensors, write_safetensors

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
EXPORTS = ROOT / "benchmarks" / "studies" / "exports"
RESULTS = ROOT / "benchmarks" / "results" / "studies"
LARGEST_EXPORT = 4 * 2**20  # bytes of a file that is committed


@dataclass(frozen=True)
class Training:
    """A run of `train.py`: `runs`/`name` by `config`, a path in the repository; further `options`
    as they are typed. A run whose config has a teacher of our own carries its name behind `name`.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    teacher: str = ""

    def folder(self, runs: Path) -> Path:
        """Where the run lies."""
        suffix = f"(teacher={self.teacher})" if self.teacher else ""
        return runs / f"{self.name}{suffix}"

    def make(self, runs: Path, data: Path | None) -> Path:
        """Train to the end, or go on to it; returns the run's export. `data` None: `options` say where
        the data lie.
        """
        where = () if data is None else ("--data.init_args.root", str(data))
        export = self.folder(runs) / "export"
        if not (export / "model.safetensors").exists():
            command(
                "train.py",
                *("--config", self.config, "--name", self.name, "--runs_root", str(runs)),
                *("--resume", "auto", *where),
                *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
                *("--save_every", "100"),
                *self.options,
            )
        return export

    def facts(self, runs: Path) -> dict[str, Any]:
        """What the run cost, from its run.json."""
        written = json.loads((self.folder(runs) / "run.json").read_text(encoding="utf-8"))
        names = ("updates", "samples_seen", "cpu_seconds", "commit")
        return {name: written.get(name) for name in names}


def command(script: str, *words: str) -> None:
    """Run a script of the repository in a process of its own; ends the study where it fails."""
    shown = " ".join([script, *words])
    log.info("%s", shown)
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {shown}")


def small_export(export: Path, name: str) -> Path:
    """One file of an export with weights in float16, in the folder that is committed.

    Real tensors are rounded, whole numbers stay. Raises UserError where the file would be too large
    to be committed, and where a weight is too large for float16.
    """
    target = EXPORTS / f"{name}.safetensors"
    if target.exists():
        return target
    found, metadata = read_safetensors(export / "model.safetensors")
    tensors = {key: rounded(key, tensor) for key, tensor in found.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > LARGEST_EXPORT:
        raise UserError(
            f"{name} has {size:,} bytes in float16; at most {LARGEST_EXPORT:,} are kept"
        )
    EXPORTS.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, target, metadata)
    return target


def rounded(key: str, tensor: Tensor) -> Tensor:
    """A real tensor in float16; raises UserError where that overflows."""
    if not tensor.is_floating_point():
        return tensor
    small = tensor.to(torch.float16)
    if not bool(torch.isfinite(small).all()):
        raise UserError(f"{key} holds values that float16 does not")
    return small


def measured(path: Path, script: str, *words: str) -> dict[str, Any]:
    """The record that a command writes to `--out path`, or that lies there already."""
    if not path.exists():
        command(script, *words, "--out", str(path))
    return json.loads(path.read_text(encoding="utf-8"))


def write_results(
    name: str, rows: Sequence[dict[str, Any]], folder: Path | None = None, **facts: Any
) -> None:
    """The JSON of a study, which is committed (None), or of a trial in a `folder`."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "rows": list(rows)}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read_results(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Inverse of `write_results`; no rows where there is no such file."""
    path = (folder or RESULTS) / f"{name}.json"
    if not path.exists():
        return {"rows": []}
    return json.loads(path.read_text(encoding="utf-8"))
