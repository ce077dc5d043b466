"""Checkpoints of a run: `last.ckpt`, the one before it, and `best.ckpt` by a validation metric.

Each is written beside its place and then moved into it, so that a kill or a full disk during the
write leaves the previous one usable. Lightning's own callback writes in place, and warns about
manual optimisation at every run. None holds a weight that is not finite: nothing could be continued
from it.
"""

import logging
import math
import os
import shutil
from concurrent.futures import Future
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from tessellar import distributed
from tessellar.callbacks.companions import lost_process
from tessellar.checkpoints.frozen import FrozenParts
from tessellar.errors import UserError, remove, writing
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.run_files import RunFiles
from tessellar.training.runs import BEST, LAST, PREVIOUS

log = logging.getLogger(__name__)
MILESTONE = "update_{:08d}.ckpt"
Files = Literal["whole", "sharded", "asynchronous"]


class Pending(NamedTuple):
    """A checkpoint that is being written while training goes on."""

    written: Future[Any]
    staged: Path
    target: Path
    older: Path
    milestone: int | None


class Checkpoints(Checkpoint):
    """Saves every `every` updates and at the end; best where `metric` (`val/loss`) has its `mode`
    over validations. Those of every `keep_every` updates stay, as `update_00010000.ckpt`.

    `files`: `whole` is one file, `sharded` a folder to which all processes write
    (checkpoints/sharded.py), `asynchronous` the same while training goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        metric: str,
        mode: Literal["min", "max"],
        keep_every: int | None = None,
        files: Files = "whole",
    ) -> None:
        if every < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"checkpoints are saved every {every} updates and kept every {keep_every}; at least 1 is needed"
            )
        self.keep_every = keep_every
        self.folder = Path(folder)
        self.every = every
        self.metric = metric
        self.mode = mode
        self.best: float | None = None
        self._saved = -1
        self._said = False
        self._due = False  # a validation belongs to the update, and comes first
        self._frozen = FrozenParts(self.folder)
        self._io = RunFiles(files)
        self._pending: Pending | None = None
        self._writing = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._io

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved = pl_module.updates
        for table in tables_of(trainer):
            table.begin(pl_module.updates)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        write_metrics(trainer)
        if self._pending is not None and self._pending.written.done():
            self._finish(trainer)
        if self._is_due(pl_module.updates) and pl_module.updates != self._saved:
            self._due = validates_now(trainer)
            if not self._due:
                self.save(trainer, pl_module)
        # A callback may measure it between two validations.
        if self.metric != pl_module.best_by[0]:
            self._consider(trainer)

    def _is_due(self, updates: int) -> bool:
        """Whether an update is one that is saved, or one that is kept."""
        kept = self.keep_every is not None and updates % self.keep_every == 0
        return kept or updates % self.every == 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._consider(trainer)
        if self._due:
            self._due = False
            self._saved = -1
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._consider(trainer)

    def _consider(self, trainer: L.Trainer) -> None:
        """Save `best.ckpt` where the metric has a new best value."""
        value = trainer.callback_metrics.get(self.metric)
        if value is None and trainer.state.fn == "fit":
            self._say_missing(trainer)
        if value is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        new = float(value)
        if self.is_better(new):
            self.best = new
            require_finite(trainer, self._whole(BEST))
            self._write(trainer, BEST)

    def _say_missing(self, trainer: L.Trainer) -> None:
        """One warning where a validation brought other metrics only; a callback may measure this
        one later.
        """
        measured = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if measured and not self._said and trainer.is_global_zero:
            self._said = True
            close = get_close_matches(self.metric, measured, n=1)
            log.warning(
                "the validation did not measure %s but %s: no best.ckpt yet%s",
                self.metric,
                ", ".join(measured),
                f"; did you mean {close[0]!r}?" if close else "",
            )

    def is_better(self, new: float) -> bool:
        """Whether a value is the best so far. NaN never is, and any number is better than it."""
        if math.isnan(new):
            return False
        if self.best is None or math.isnan(self.best):
            return True
        return new < self.best if self.mode == "min" else new > self.best

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)
        self._settle(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._pending is not None and self._pending.written.done():
            self._finish(trainer)  # without the others, which may not come here

    def save_at_once(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write `last.ckpt` now, and once more after a validation that belongs to this update."""
        write_metrics(trainer)
        self.save(trainer, pl_module)
        self._due = validates_now(trainer)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write `last.ckpt` now, unless it is of this very update; raises UserError where it cannot
        be written.
        """
        if pl_module.updates != self._saved:
            require_finite(trainer, self._whole(LAST, PREVIOUS))
            kept = self.keep_every is not None and pl_module.updates % self.keep_every == 0
            milestone = pl_module.updates if kept else None
            self._write(trainer, LAST, keep=PREVIOUS, milestone=milestone)
            self._saved = pl_module.updates

    def _keep(self, updates: int) -> None:
        """Have what `last.ckpt` names under a second name too, which no later one replaces."""
        milestone = self.folder / MILESTONE.format(updates)
        staged = milestone.with_name(f"{milestone.name}.part")
        with writing(milestone, unfinished=staged):
            remove(staged)
            if (self.folder / LAST).is_dir():
                shutil.copytree(self.folder / LAST, staged, copy_function=linked)
            else:
                linked(self.folder / LAST, staged)
            put(staged, milestone)
            flush(self.folder)

    def _write(
        self, trainer: L.Trainer, name: str, keep: str | None = None, milestone: int | None = None
    ) -> None:
        """Write `name`, its old content goes to `keep`; every process takes part, the first one
        moves files. None goes on before the file is in its place; where that fails all of them raise.
        Asynchronous ones are put in their place later.
        """
        self._settle(trainer)
        target = self.folder / name
        staged = self.folder / f"{name}.part"
        older = target if keep is None else self.folder / keep
        self._prepare(trainer, staged, target)
        failure: str | None = None
        written = False
        self._writing = True
        try:
            trainer.save_checkpoint(staged)
            written = True
            under_way = self._io.under_way
            if under_way is not None:
                self._pending = Pending(under_way, staged, target, older, milestone)
            elif trainer.is_global_zero:
                self._place(staged, target, older, milestone)
        except (OSError, RuntimeError) as error:
            if lost_process(error) is not None:
                raise
            if not written:
                distributed.barrier()  # the others wait inside of save_checkpoint
            remove(staged)
            failure = " ".join(str(error).split())
        finally:
            self._writing = False
        self._agree(failure, target, older)

    def _prepare(self, trainer: L.Trainer, staged: Path, target: Path) -> None:
        """Frozen parts in their files, and no folder that a kill left: it would keep what is not
        written again. Before the processes write together, so that all hear of a failure.
        """
        failure: str | None = None
        if trainer.is_global_zero:
            if staged.is_dir():
                remove(staged)
            try:
                frozen = getattr(trainer.lightning_module, "frozen_parts", None)
                self._frozen.place({} if frozen is None else frozen())
            except (OSError, UserError) as error:
                failure = " ".join(str(error).split())
        self._agree(failure, target, target)

    def _agree(self, failure: str | None, target: Path, older: Path) -> None:
        """Raise UserError on every process where one of them failed."""
        failures = [said for said in distributed.all_gather(failure) if said is not None]
        if failures:
            whole = self._whole(target.name, older.name)
            raise UserError(
                f"{target} could not be written: {failures[0]}. Last whole checkpoint: {whole}"
            )

    def _place(self, staged: Path, target: Path, older: Path, milestone: int | None) -> None:
        """Move what was written into its place."""
        flush(staged)
        if older != target and target.exists():
            put(target, older)
        put(staged, target)
        flush(self.folder)
        if milestone is not None:
            self._keep(milestone)

    def _finish(self, trainer: L.Trainer) -> None:
        """Put an asynchronous checkpoint that is written into its place, on the first process."""
        pending = self._pending
        if pending is None or not trainer.is_global_zero:
            return
        self._pending = None
        try:
            pending.written.result()
            self._place(pending.staged, pending.target, pending.older, pending.milestone)
        except (OSError, RuntimeError, CheckpointException) as error:
            remove(pending.staged)
            whole = self._whole(pending.target.name, pending.older.name)
            raise UserError(
                f"{pending.target} could not be written: {' '.join(str(error).split())}. "
                f"Last whole checkpoint: {whole}"
            ) from error

    def _settle(self, trainer: L.Trainer) -> None:
        """Wait for an asynchronous checkpoint, on every process; the first one moves it."""
        if self._pending is not None:
            self._pending.written.exception()
        self._finish(trainer)
        self._pending = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Leave frozen parts out of what is written here: a checkpoint that somebody else saves,
        anywhere, is whole.
        """
        if self._writing:
            self._frozen.leave_out(checkpoint, pl_module.frozen_parts())

    def _whole(self, *names: str) -> Path | str:
        """The first of these checkpoints that is there, to be named to the user."""
        for name in names:
            if (self.folder / name).exists():
                return self.folder / name
        return "none"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def linked(source: str | Path, target: str | Path) -> None:
    """One file under a second name, copied where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def put(source: Path, target: Path) -> None:
    """Move a file or a folder to `target`, in the place of what is there."""
    if source.is_dir() or target.is_dir():
        remove(target)  # a rename replaces files only
    source.replace(target)


def validates_now(trainer: L.Trainer) -> bool:
    """Whether a validation follows on the batch that has just ended."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(
        loop._data_fetcher
    )


def tables_of(trainer: L.Trainer) -> list[MetricsFile]:
    """The run's metrics.csv, on the process that writes it."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def write_metrics(trainer: L.Trainer) -> None:
    """Write the metrics of the batch that has just ended, before a checkpoint of it: Lightning does
    so only after.
    """
    if not tables_of(trainer):
        return
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    if "step" in metrics:
        step = int(metrics.pop("step"))
        for table in tables_of(trainer):
            table.log_metrics(metrics, step)


def require_finite(trainer: L.Trainer, whole: Path | str) -> None:
    """Raise UserError, on all processes, where a weight of any is NaN or infinite; `whole` is what
    is left.
    """
    first = None
    for name, tensor in trainer.lightning_module.state_dict().items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.is_floating_point() and not torch.isfinite(own).all():
            first = name
            break
    found = [name for name in distributed.all_gather(first) if name is not None]
    if found:
        raise UserError(
            f"{found[0]} is not finite any more, so nothing is saved. Last whole checkpoint: {whole}"
        )


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder, before anything
    relies on it.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
