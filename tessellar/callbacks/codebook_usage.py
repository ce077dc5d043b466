"""Codebook usage of every segment, in training and validation, and a warning when a codebook collapses."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tessellar.tokenizers.layout import Categorical, Layout

log = logging.getLogger(__name__)
ADVICE = (
    "try codes initialised from data (init_step), dead-code restart (restart_every), an entropy weight, fewer codes or "
    "a smaller code dimension, or a lower learning rate"
)


class CodebookUsage(L.Callback):
    """Logs usage (share of codes drawn), perplexity and dead codes over each window of `every` batches.

    Below a usage of `warn_below` after `grace` updates it warns once, with what to try.
    """

    def __init__(self, every: int = 100, warn_below: float = 0.1, grace: int = 500) -> None:
        self.every, self.warn_below, self.grace, self._warned = every, warn_below, grace, False
        self._train: list[Tensor] = []
        self._val: list[Tensor] = []

    @staticmethod
    def _count(counts: list[Tensor], tokens: Tensor, layout: Layout) -> list[Tensor]:
        starts = layout.starts
        new = []
        for segment, start, stop in zip(layout.segments, starts, starts[1:], strict=False):
            assert isinstance(segment.kind, Categorical)
            new.append(tokens[:, start:stop].flatten().bincount(minlength=segment.kind.vocab).cpu())
        return [a + b for a, b in zip(counts, new, strict=True)] if counts else new

    def _log(self, pl_module: L.LightningModule, stage: str, counts: list[Tensor], layout: Layout) -> float:
        lowest = 1.0
        for segment, count in zip(layout.segments, counts, strict=True):
            probs = count / count.sum()
            usage = float((count > 0).float().mean())
            name = f"{stage}/codebook_{segment.name}" if len(counts) > 1 else f"{stage}/codebook"
            perplexity = float(torch.special.entr(probs).sum().exp())
            dead = float((count == 0).sum())
            pl_module.log_dict({f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_dead": dead})
            lowest = min(lowest, usage)
        return lowest

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        layout = pl_module.tokenizer.layout
        if not layout.is_categorical:
            return
        self._train = self._count(self._train, outputs["tokens"], layout)
        if pl_module.batches % self.every == 0:
            usage = self._log(pl_module, "train", self._train, layout)
            self._train = []
            if usage < self.warn_below and pl_module.updates >= self.grace and not self._warned:
                self._warned = True
                log.warning(
                    "only %.1f %% of a codebook is used at update %d: %s", 100 * usage, pl_module.updates, ADVICE
                )

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if pl_module.tokenizer.layout.is_categorical:
            self._val = self._count(self._val, outputs["tokens"], pl_module.tokenizer.layout)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._val:
            self._log(pl_module, "val", self._val, pl_module.tokenizer.layout)
            self._val = []
