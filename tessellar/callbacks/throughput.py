"""Throughput: images/s, tokens/s, the share of time spent waiting for data, and what a run cost."""

import time
from typing import Any

import lightning as L

from tessellar.training.base import TrainingModule


class Throughput(L.Callback):
    """Logs rates every `every` batches, prints parameters at the start and totals at the end."""

    def __init__(self, every: int = 50) -> None:
        self.every, self.samples, self.tokens = every, 0, 0
        self._cpu = self._wall = self._waited = 0.0
        self.cpu_seconds = self.wall_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        if trainer.is_global_zero:
            print(f"parameters: {trained:,} trained, {frozen:,} frozen; updates: {trainer.max_steps}")
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        self._mark = (self._wall, self.samples, self.tokens)
        self._batch_end = self._wall

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        tokens = outputs["tokens"]
        self.samples += len(tokens) * trainer.world_size
        self.tokens += tokens.shape[0] * tokens.shape[1] * trainer.world_size
        self._batch_end = time.perf_counter()
        if pl_module.batches % self.every == 0:
            wall, samples, counted = self._mark
            elapsed = self._batch_end - wall
            pl_module.log_dict(
                {
                    "speed/images_per_second": (self.samples - samples) / elapsed,
                    "speed/tokens_per_second": (self.tokens - counted) / elapsed,
                    "speed/data_wait_share": self._waited / elapsed,
                    "speed/samples_seen": float(self.samples),
                }
            )
            self._mark, self._waited = (self._batch_end, self.samples, self.tokens), 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cpu_seconds += time.process_time() - self._cpu
        self.wall_seconds += time.perf_counter() - self._wall
        if trainer.is_global_zero:
            print(
                f"trained on {self.samples:,} samples ({self.tokens:,} tokens) in {self.wall_seconds:.0f} s, "
                f"{self.cpu_seconds:.0f} CPU-seconds"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.tokens = state_dict["samples"], state_dict["tokens"]
