"""Codebook usage of every segment, in training and validation, and a warning when a codebook
collapses.

Usage is the share of codes drawn in a window, perplexity the exponential of the entropy of their
frequencies. Factorized tokens have one codebook a factor, binary ones one of two codes a bit: usage
and perplexity are means then, and the least used factor or bit is named by its number.
"""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tessellar import distributed
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.layout import Layout, codebooks

log = logging.getLogger(__name__)
ADVICE = (
    "try codes initialised from data (init_step), dead-code restart (restart_every), an entropy weight, fewer codes or "
    "a smaller code dimension, or a lower learning rate"
)


@in_ranges
class CodebookUsage(L.Callback):
    """Logs usage, perplexity and dead codes over windows of `every` batches, summed over processes.

    Below a usage of `warn_below` after `grace` updates it warns once, with what to try (0: never,
    for a tokenizer that is not trained).
    """

    def __init__(self, every: int = 100, warn_below: float = 0.1, grace: int = 500) -> None:
        self.every = every
        self.warn_below = warn_below
        self.grace = grace
        self._warned = False
        self._train: list[Tensor] = []
        self._val: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        layout: Layout = pl_module.tokenizer.layout
        if layout.is_continuous:
            return
        self._train = add_counts(self._train, outputs["tokens"], layout)
        if pl_module.batches % self.every == 0:
            lowest, codebook = min(self._log(pl_module, "train", self._train, layout))
            self._train = []
            if lowest < self.warn_below and pl_module.updates >= self.grace and not self._warned:
                self._warned = True
                where = f"the codebook of {codebook} are in use at update {pl_module.updates}"
                log.warning("%.1f %% of %s: %s", 100 * lowest, where, ADVICE)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not pl_module.tokenizer.layout.is_continuous:
            self._val = add_counts(self._val, outputs["tokens"], pl_module.tokenizer.layout)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._val:
            self._log(pl_module, "val", self._val, pl_module.tokenizer.layout)
            self._val = []

    def _log(
        self, pl_module: Any, stage: str, counts: list[Tensor], layout: Layout
    ) -> list[tuple[float, str]]:
        """Log all segments; returns the usage and the name of each."""
        found = []
        for segment, count in zip(layout.segments, counts, strict=True):
            name = f"{stage}/codebook_{segment.name}" if len(counts) > 1 else f"{stage}/codebook"
            facts = usage(distributed.all_reduce_sum(count).split(codebooks(segment)))
            pl_module.log_dict({f"{name}_{fact}": value for fact, value in facts.items()})
            found.append((facts["usage"], segment.name))
        return found


def add_counts(counts: list[Tensor], tokens: Tensor, layout: Layout) -> list[Tensor]:
    """`counts` (one int64 tensor a segment, its codebooks one behind the other) with those of
    tokens [B, N, ...].
    """
    starts = layout.starts
    new = []
    for segment, start, stop in zip(layout.segments, starts, starts[1:], strict=False):
        sizes = torch.tensor(codebooks(segment))
        offsets = (sizes.cumsum(0) - sizes).to(tokens.device)
        ids = tokens[:, start:stop].reshape(-1, len(sizes)) + offsets
        new.append(ids.flatten().bincount(minlength=int(sizes.sum())))
    return [a + b for a, b in zip(counts, new, strict=True)] if counts else new


def usage(counts: tuple[Tensor, ...]) -> dict[str, float]:
    """Usage and perplexity (means over codebooks) and the number of codes that were never drawn."""
    shares: list[float] = []
    perplexities: list[float] = []
    dead = 0
    for count in counts:
        entropy = torch.special.entr(count.double() / count.sum()).sum()
        shares.append(float((count > 0).double().mean()))
        perplexities.append(float(entropy.exp()))
        dead += int((count == 0).sum())
    facts = {
        "usage": sum(shares) / len(counts),
        "perplexity": sum(perplexities) / len(counts),
        "dead": float(dead),
    }
    if len(counts) > 1:
        facts["least_usage"] = min(shares)
        facts["least_perplexity"] = min(perplexities)
        facts["least_factor"] = float(perplexities.index(min(perplexities)))
    return facts
