"""TrainingModule: one training loop body for all systems, under manual optimisation.

Lightning's automatic optimisation takes one optimizer and, with two, refuses clipping and accumulation and counts every
optimizer's step. Here each *update* accumulates `accumulate` batches, clips, skips non-finite gradients and steps;
only the first optimizer goes through Lightning, so `global_step` and `max_steps` count updates, not optimizers.
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from tessellar.training.optim import set_factor
from tessellar.training.schedules import Schedule

log = logging.getLogger(__name__)
STATE_KEY = "training_state"


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had no finite gradient."""


class Player(NamedTuple):
    """Who trains together: parameters, their optimizers and schedule (a generator side, a discriminator)."""

    name: str
    parameters: list[nn.Parameter]
    optimizers: list[Optimizer]
    schedule: Schedule


class TrainingModule(L.LightningModule, ABC):
    """Base of the tokenizer and the generator module.

    `batches` and `updates` count what the run has seen; `skipped` are the updates of one player that were left out
    because its gradient was not finite, and `max_skipped` of them in a row stop the run. A subclass returns its loss
    under `loss` and its tokens under `tokens` from `training_step`.
    """

    #: The validation metric that the best checkpoint is chosen by, and whether the `min` or `max` of it is best.
    best_by: tuple[str, Literal["min", "max"]] = ("val/loss", "min")

    def __init__(self, clip: float | None, accumulate: int, max_skipped: int) -> None:
        super().__init__()
        if accumulate < 1 or max_skipped < 1 or (clip is not None and clip <= 0):
            raise ValueError(
                f"accumulate is {accumulate}, max_skipped {max_skipped}, clip {clip}: the first two are at least 1, "
                "clip above 0 or null"
            )
        self.automatic_optimization = False
        self.clip, self.accumulate, self.max_skipped = clip, accumulate, max_skipped
        self.batches, self.updates, self.skipped = 0, 0, 0
        self._skipped_in_a_row: dict[str, int] = {}
        self.players: list[Player] = []

    @property
    @abstractmethod
    def ema_target(self) -> nn.Module:
        """The sub-module that exponential averages are kept of."""

    @abstractmethod
    def make_players(self) -> list[Player]:
        """Parameters with their optimizers, main one first."""

    def configure_optimizers(self) -> list[Optimizer]:
        self.players = self.make_players()
        return [optimizer for player in self.players for optimizer in player.optimizers]

    @property
    def total_updates(self) -> int:
        """Length of the run in updates, for schedules; huge where the run has no end."""
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        limits = [steps] if steps >= 0 else []
        batches = self.trainer.num_training_batches
        if epochs is not None and epochs >= 0 and batches != float("inf"):
            limits.append(epochs * int(batches) // self.accumulate)
        return max(1, min(limits, default=sys.maxsize))

    @property
    def at_boundary(self) -> bool:
        """Whether the current batch is the last of its update."""
        return (self.batches + 1) % self.accumulate == 0

    def backward_and_step(self, player: Player, loss: Tensor) -> None:
        """Add the gradient of `loss`; on the last batch of an update clip and step."""
        self.manual_backward(loss / self.accumulate)
        if not self.at_boundary:
            return
        norm = nn.utils.clip_grad_norm_(player.parameters, self.clip or float("inf"))
        factor = player.schedule.factor(self.updates, self.total_updates)
        self.log_train({f"train/grad_norm_{player.name}": norm, f"train/lr_factor_{player.name}": factor})
        if bool(torch.isfinite(norm)):
            self._skipped_in_a_row[player.name] = 0
            set_factor(player.optimizers, factor)
            self._step(player)
        else:
            self._skip(player.name)
        for optimizer in player.optimizers:
            optimizer.zero_grad()

    def _step(self, player: Player) -> None:
        for number, optimizer in enumerate(player.optimizers):
            through = self._lightning_optimizer() if player is self.players[0] and number == 0 else optimizer
            through.step()

    def _lightning_optimizer(self) -> LightningOptimizer:
        first = self.optimizers()
        return first[0] if isinstance(first, list) else first  # type: ignore[return-value]

    def _skip(self, name: str) -> None:
        self.skipped += 1
        in_a_row = self._skipped_in_a_row[name] = self._skipped_in_a_row.get(name, 0) + 1
        log.warning(
            "update %d: gradient of the %s is not finite, skipped (%d so far)", self.updates, name, self.skipped
        )
        if in_a_row >= self.max_skipped:
            raise NonFiniteGradients(
                f"{in_a_row} updates in a row of the {name} had no finite gradient, the last is update {self.updates}; "
                "lower the learning rate or use precision 32-true"
            )

    def finish_batch(self) -> None:
        """Count the batch, and the update where it ends one."""
        if self.at_boundary:
            self.updates += 1
        self.batches += 1

    @property
    def logs_now(self) -> bool:
        """Whether the current batch is one whose metrics are written; others are not even handed to Lightning."""
        return (self.batches + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def log_train(self, values: Mapping[str, Tensor | float]) -> None:
        """Log metrics of a training batch, at the number of updates made with it."""
        if self.logs_now:
            self.log_dict({"step": float(self.updates + self.at_boundary), **values})

    def log_terms(self, stage: Literal["train", "val"], terms: Mapping[str, Tensor], size: int) -> None:
        """Log named terms of a batch of `size`; in validation as a mean over samples and processes."""
        values = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        if stage == "train":
            self.log_train(values)
        else:
            self.log_dict(values, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("step", float(self.updates))  # where loggers place the validation's metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE_KEY] = {"batches": self.batches, "updates": self.updates, "skipped": self.skipped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint.get(STATE_KEY, {}).items():
            setattr(self, name, value)


def trainable(*modules: nn.Module | None) -> list[nn.Parameter]:
    """Parameters of modules that take gradients."""
    chosen: Iterable[nn.Module] = (m for m in modules if m is not None)
    return [p for module in chosen for p in module.parameters() if p.requires_grad]
