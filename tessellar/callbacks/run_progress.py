"""RunProgress: one bar over the whole run on a terminal, elsewhere a line every so often.

Both say the same: update n of N, the loss, the last validation, images/s, the GPU's memory, and how
long the rest will take. Lightning's own bars are of one epoch.
"""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from tessellar.progress import Pace, Progress, duration

log = logging.getLogger(__name__)
PARTS = 20  # a run says at least so many times where it is
STEADY = 1.0  # seconds over which images/s are counted at least


class RunProgress(L.Callback):
    """Shows where the run is, on the first process alone."""

    def __init__(self) -> None:
        self._bar: RunBar | None = None
        self._pace = Pace()
        self._said = 0  # the update of the last line
        self._images = 0  # since `_mark`
        self._mark = 0.0
        self._speed = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        total = None if pl_module.total_updates == sys.maxsize else pl_module.total_updates
        if trainer.is_global_zero and total is not None:
            for line in missed(trainer, pl_module, total):
                log.warning("%s", line)
        self._bar = RunBar("update", total, "updates", quiet=not trainer.is_global_zero)
        self._bar.__enter__()
        self._bar.start_at(pl_module.updates)
        self._pace = Pace()
        self._said = pl_module.updates
        self._images = 0
        self._mark = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self._bar
        if bar is None or bar.quiet:
            return
        self._images += len(outputs["tokens"]) * trainer.world_size
        if pl_module.updates == bar.done:
            return  # batches that are accumulated
        # The loss is read from the device only where it is shown: reading waits for it.
        if bar.is_drawn and bar.wants_facts:
            bar.update(pl_module.updates - bar.done, self._facts(trainer, pl_module, outputs))
            return
        bar.done = pl_module.updates
        if not bar.is_drawn and self._is_due(bar):
            log.info("%s", bar.line(self._facts(trainer, pl_module, outputs)))

    def _is_due(self, bar: "RunBar") -> bool:
        """By the clock, at each twentieth of the run, and at its last update."""
        by_part = bar.total is not None and (bar.done - self._said) * PARTS >= bar.total
        if not (self._pace.due() or by_part or bar.done == bar.total):
            return False
        self._said = bar.done
        return True

    def _facts(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> dict[str, str]:
        """What is said beside the update."""
        facts = {"loss": f"{float(outputs['loss']):.4f}"}
        metric = last_validation(trainer, pl_module)
        if metric is not None:
            facts[metric] = f"{float(trainer.callback_metrics[metric]):.4g}"
        now = time.monotonic()
        if now - self._mark >= STEADY or not self._speed:
            self._speed = f"{self._images / max(now - self._mark, 1e-9):,.0f} images/s"
            self._images = 0
            self._mark = now
        facts["speed"] = self._speed
        memory = gpu_memory(pl_module.device)
        if memory is not None:
            facts["GPU memory"] = f"{memory:.1f} GB"
        return facts

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()


class RunBar(Progress):
    """Updates of a run; it says images/s of its facts, not updates/s."""

    def line(self, facts: Mapping[str, str]) -> str:
        """`update 200 of 700: loss 0.1234, val/psnr 20.1, 812 images/s, eta 3:12`."""
        of = f" of {self.total:,}" if self.total else ""
        told = [value if name == "speed" else f"{name} {value}" for name, value in facts.items()]
        if self.eta is not None:
            told.append(f"eta {duration(self.eta)}")
        return f"update {self.done:,}{of}: {', '.join(told)}"


def missed(trainer: L.Trainer, pl_module: Any, total: int) -> list[str]:
    """What a run of `total` updates will not leave, since it ends before the first time."""
    batches = total * pl_module.accumulate
    said = []
    epochs = trainer.check_val_every_n_epoch or 1
    first = float(trainer.val_check_batch or 0)
    if epochs > 1:
        first += (epochs - 1) * trainer.num_training_batches
    if trainer.enable_validation and batches < first:
        said.append(
            f"the run ends after {total:,} updates, before its first validation: no best.ckpt and no pictures; "
            "lower --trainer.val_check_interval"
        )
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if batches < every:
        said.append(
            f"the run ends after {batches:,} batches, before the first {every}: no losses in metrics.csv; "
            "lower --log_every"
        )
    return said


def last_validation(trainer: L.Trainer, pl_module: Any) -> str | None:
    """The measure of the last validation that the run is judged by, or its loss; None before one."""
    names = (pl_module.best_by[0], "val/loss")
    return next((name for name in names if name in trainer.callback_metrics), None)


def gpu_memory(device: torch.device) -> float | None:
    """The most memory that a GPU had in use so far, in GB; None on other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9
