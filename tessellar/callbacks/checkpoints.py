"""Checkpoints of a run: `last.ckpt`, the one before it, and `best.ckpt` by a validation metric.

Each is written beside its place and then moved into it, so that a kill or a full disk during the write leaves the
previous one usable. Lightning's own callback writes in place, and warns about manual optimisation at every run.
"""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """Saves every `every` updates and at the end; best where `metric` (`val/loss`) has its `mode` over validations."""

    def __init__(self, folder: str | Path, every: int, metric: str, mode: Literal["min", "max"]) -> None:
        if every < 1:
            raise ValueError(f"checkpoints are saved every {every} updates; at least 1 is needed")
        self.folder, self.every, self.metric, self.mode = Path(folder), every, metric, mode
        self.best: float | None = None
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved = pl_module.updates

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.updates % self.every == 0 and pl_module.updates != self._saved:
            self._save_last(trainer, pl_module)
        if self.metric != pl_module.best_by[0]:  # a callback may measure it between two validations
            self._consider(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._consider(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._consider(trainer)

    def _consider(self, trainer: L.Trainer) -> None:
        """Save `best.ckpt` where the metric has a new best value."""
        value = trainer.callback_metrics.get(self.metric)
        if value is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        new = float(value)
        if self.best is None or (new < self.best if self.mode == "min" else new > self.best):
            self.best = new
            self._write(trainer, BEST)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.updates != self._saved:
            self._save_last(trainer, pl_module)

    def _save_last(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved = pl_module.updates
        self._write(trainer, LAST, keep=PREVIOUS)

    def _write(self, trainer: L.Trainer, name: str, keep: str | None = None) -> None:
        """Write `name`, its old content goes to `keep`; every process takes part, the first one moves files."""
        target, staged = self.folder / name, self.folder / f"{name}.part"
        trainer.save_checkpoint(staged)
        if trainer.is_global_zero:
            if keep is not None and target.exists():
                target.replace(self.folder / keep)
            staged.replace(target)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
