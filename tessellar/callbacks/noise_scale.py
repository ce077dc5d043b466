"""The gradient noise scale: above which batch size more samples an update help less and less
(McCandlish et al., arXiv 1812.06162, appendix A.1).

Gradients of two batch sizes say it: of each accumulated batch of b samples and of their mean, of B.

    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b)        S = (|G_b|^2 - |G_B|^2) / (1 / b - 1 / B)

Both are unbiased and noisy; each is averaged over updates, and the scale is S / |G|^2, in samples.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges
from tessellar.training.base import Player, TrainingModule


@in_ranges
class GradientNoiseScale(L.Callback):
    """Logs `train/noise_scale` (samples), of the main part of a run, from every `every`-th update.

    `decay` is that of the two running means. It needs `accumulate` of at least 2, and holds one copy
    of the gradients while it looks. Gradients are those before clipping. Raises UserError, as the run
    begins, for a run of one batch an update and for a sharded one.
    """

    def __init__(self, every: int = 10, decay: float = 0.95) -> None:
        self.every = every
        self.decay = decay
        self.looked = 0
        self.square = 0.0  # running means of |G|^2 and S, from 0: both are divided by the same
        self.variance = 0.0
        self._before: list[Tensor | None] = []
        self._small: list[float] = []
        self._size = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.accumulate < 2 or pl_module.is_sharded:
            raise UserError(
                f"the noise scale compares batches with their mean: model.accumulate is {pl_module.accumulate}, "
                "give at least 2, and no sharded strategy"
            )
        pl_module.gradient_watchers.append(self.look)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.gradient_watchers.remove(self.look)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        # Processes average their gradients in each backward pass.
        self._size = len(next(iter(batch.values()))) * trainer.world_size

    def look(self, module: TrainingModule, player: Player) -> None:
        """Called when a player's gradient holds one batch more."""
        if player is not module.players[0] or module.updates % self.every:
            return
        if module.batches % module.accumulate == 0:
            self._small = []
            self._before = []
        gradients = [parameter.grad for parameter in player.parameters]
        number = len(self._small) + 1
        if number != module.batches % module.accumulate + 1:
            return  # a resume within this update: its first batches were not seen
        added = differences(gradients, self._before)
        # What is added is divided by the number of batches.
        self._small.append(float(square_norm(added)) * module.accumulate**2)
        if not module.at_boundary:
            self._before = [None if g is None else g.detach().clone() for g in gradients]
            return
        self._before = []
        large = float(square_norm(gradients))
        if torch.isfinite(torch.tensor([large, *self._small])).all():
            self.add(sum(self._small) / number, large, small_size=self._size, batches=number)
            module.log_train({"train/noise_scale": self.scale})

    def add(self, small: float, large: float, small_size: int, batches: int) -> None:
        """One look: the mean of |G_b|^2 and |G_B|^2, of b and `batches` times b samples."""
        b = small_size
        total = b * batches
        square = (total * large - b * small) / (total - b)
        variance = (small - large) / (1 / b - 1 / total)
        self.square += (1 - self.decay) * (square - self.square)
        self.variance += (1 - self.decay) * (variance - self.variance)
        self.looked += 1

    @property
    def scale(self) -> float:
        """S / |G|^2 in samples; NaN where the means say that the gradient is nothing but noise."""
        return self.variance / self.square if self.square > 0 else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"looked": self.looked, "square": self.square, "variance": self.variance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looked = state_dict["looked"]
        self.square = state_dict["square"]
        self.variance = state_dict["variance"]


def differences(
    gradients: Sequence[Tensor | None], before: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients less those of before, where there were some."""
    if not before:
        return list(gradients)
    found: list[Tensor | None] = []
    for gradient, old in zip(gradients, before, strict=True):
        found.append(gradient if gradient is None or old is None else gradient - old)
    return found


def square_norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """Sum of squares of all values, in float32."""
    total = torch.zeros(())
    for tensor in tensors:
        if tensor is not None:
            total = total.to(tensor.device) + tensor.detach().float().square().sum()
    return total
