"""A run's folder, runs/<name>/: its config, checkpoints, pictures, metrics and export. Nothing is written elsewhere."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger

from tessellar.errors import UserError

LAST = "last.ckpt"
LIBRARIES = ("torch", "lightning", "tessellar", "timm", "torchmetrics")


class Run:
    """The folder of one run. A run never writes into another run's folder.

    `resume` is a checkpoint's path, `auto` (continue this run if it has a checkpoint, else start) or None. Raises
    UserError where the name is taken.
    """

    def __init__(self, name: str, root: str | Path = "runs", resume: str | None = None) -> None:
        if not name or Path(name).name != name:
            raise UserError(f"--name {name!r} must be a plain folder name")
        self.name, self.folder = name, Path(root) / name
        last = self.folder / "checkpoints" / LAST
        self.checkpoint: Path | None = None
        if resume == "auto":
            self.checkpoint = last if last.exists() else None
        elif resume is not None:
            self.checkpoint = Path(resume)
            if not self.checkpoint.is_file():
                raise UserError(f"--resume {resume}: there is no such checkpoint")
        if self.checkpoint is None and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists; choose another --name, or continue that run with --resume auto")

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def loggers(self, wandb: str | None = None) -> list[Logger]:
        """CSV always, TensorBoard where it is installed, wandb where a project is named."""
        loggers: list[Logger] = [CSVLogger(self.folder, name="", version="logs")]
        if _installed("tensorboard"):
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(self.folder, name="", version="tensorboard"))
        if wandb:
            loggers.append(self._wandb(wandb))
        return loggers

    def _wandb(self, project: str) -> Logger:
        """Offline unless a key is set; the id is kept in the run's folder, so a resumed run continues its page."""
        import os

        from lightning.pytorch.loggers import WandbLogger

        kept = self.folder / "wandb_id"
        if not kept.exists():
            import wandb

            kept.write_text(wandb.util.generate_id())
        key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "online"
        return WandbLogger(
            project=project,
            name=self.name,
            id=kept.read_text(),
            save_dir=self.folder,
            offline=not key,
            resume=None if not key else "allow",
        )

    def write(self, file: str, content: dict[str, Any]) -> None:
        """Write JSON into the run's folder, beside and then in place."""
        target = self.folder / file
        staged = target.with_suffix(".tmp")
        staged.write_text(json.dumps(content, indent=2))
        staged.replace(target)

    def facts(self, trainer: L.Trainer) -> dict[str, Any]:
        """What a later reader wants to know of the machine and the code."""
        return {
            "name": self.name,
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in LIBRARIES},
            "precision": trainer.precision,
            "devices": trainer.num_devices,
        }


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def commit() -> str:
    """The checkout's commit, marked `-dirty` where files changed; `unknown` outside git."""
    try:
        root = Path(__file__).resolve().parents[2]
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return described.stdout.strip() or "unknown"
