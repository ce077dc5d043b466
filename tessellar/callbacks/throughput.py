"""Throughput: images/s, tokens/s, operations/s, the share of time spent waiting for data, and what
a run cost.
"""

import logging
import os
import sys
import time
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L

from tessellar.callbacks.run_progress import gpu_memory
from tessellar.protocol.arguments import in_ranges
from tessellar.training import flops
from tessellar.training.base import TrainingModule
from tessellar.training.facts import count_parameters

log = logging.getLogger(__name__)
# Batches between two counts of operations: a discriminator may have joined.
COUNT_EVERY = 1000


@in_ranges
class Throughput(L.Callback):
    """Logs rates every `every` batches, parameters at the start and totals at the end.

    Totals count over resumes. CPU time includes that of data workers.
    Operations are those of one process, and MFU is their rate against its GPU's peak, where that is
    known.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.samples = 0
        self.tokens = 0
        self.cpu_seconds = self.wall_seconds = 0.0
        self._cpu = self._wall = self._waited = self._batch_end = 0.0
        self._mark = (0.0, 0, 0)
        self._count: flops.CountFlops | None = None
        self._flops = self._batches = 0
        self._peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.is_global_zero:
            trained, frozen = count_parameters(pl_module)
            total = pl_module.total_updates
            log.info(
                "parameters: %s trained, %s frozen; updates: %s",
                f"{trained:,}",
                f"{frozen:,}",
                "no end" if total == sys.maxsize else f"{total:,}",
            )
        self._cpu = cpu_time()
        self._wall = time.perf_counter()
        self._mark = (self._wall, self.samples, self.tokens)
        self._batch_end = self._wall
        self._waited = 0.0
        self._flops = 0
        self._batches = 0
        self._peak = flops.peak(pl_module.device, str(trainer.precision))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._waited += time.perf_counter() - self._batch_end
        if (self._flops == 0 or pl_module.batches % COUNT_EVERY == 0) and flops.countable(
            pl_module
        ):
            self._count = flops.CountFlops().__enter__()

    def _end_count(self) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)
            self._flops = self._count.total
            self._count = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end_count()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._end_count()
        self._batches += 1
        tokens = outputs["tokens"]
        self.samples += len(tokens) * trainer.world_size
        self.tokens += tokens.shape[0] * tokens.shape[1] * trainer.world_size
        if pl_module.batches % self.every == 0:
            self._log_rates(pl_module)
        self._batch_end = time.perf_counter()

    def _log_rates(self, pl_module: TrainingModule) -> None:
        """Log all rates of the batches since the last time."""
        now = time.perf_counter()
        before, samples, tokens = self._mark
        elapsed = max(now - before, 1e-9)
        rate = self._flops * self._batches / elapsed
        counted = {"speed/tflops_per_second": rate / 1e12} if rate else {}
        if rate and self._peak:
            counted["speed/mfu"] = rate / self._peak
        memory = gpu_memory(pl_module.device)
        if memory is not None:
            counted["speed/gpu_memory_gb"] = memory
        pl_module.log_dict(
            {
                **counted,
                "speed/images_per_second": (self.samples - samples) / elapsed,
                "speed/tokens_per_second": (self.tokens - tokens) / elapsed,
                "speed/data_wait_share": self._waited / elapsed,
                "speed/samples_seen": float(self.samples),
            }
        )
        self._batches = 0
        self._mark = (now, self.samples, self.tokens)
        self._waited = 0.0

    def _add_times(self) -> None:
        cpu = cpu_time()
        wall = time.perf_counter()
        self.cpu_seconds, self.wall_seconds = (
            self.cpu_seconds + cpu - self._cpu,
            self.wall_seconds + wall - self._wall,
        )
        self._cpu = cpu
        self._wall = wall

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add_times()
        if trainer.is_global_zero:
            log.info(
                "trained on %s samples (%s tokens) in %.0f s, %.0f CPU-seconds",
                f"{self.samples:,}",
                f"{self.tokens:,}",
                self.wall_seconds,
                self.cpu_seconds,
            )

    def costs(self) -> dict[str, float]:
        """What the run cost so far, plain data for its record."""
        return {
            "samples_seen": self.samples,
            "tokens_seen": self.tokens,
            "cpu_seconds": round(self.cpu_seconds, 1),
            "wall_seconds": round(self.wall_seconds, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        if self._wall:
            self._add_times()
        names = ("samples", "tokens", "cpu_seconds", "wall_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def cpu_time() -> float:
    """CPU seconds of this process and of its children, of those that run where Linux tells them."""
    times = os.times()
    ended = times.children_user + times.children_system
    return times.user + times.system + ended + sum(map(_cpu_time_of, active_children()))


def _cpu_time_of(process: BaseProcess) -> float:
    """CPU seconds of another process; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
