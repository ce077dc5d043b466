"""EMA: exponential moving average of the trained weights, a callback of our own.

Lightning's averages the whole module, frozen tokenizer and discriminator included, and loses the
raw weights at the end of `fit`. This one averages what `pl_module.ema_target` names, in float32,
with the warm-up min(decay, (1 + t) / (10 + t)) of the TensorFlow implementation (or without, as
some papers do), swaps it in for validation, test and prediction, and saves it under its own key.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tessellar.checkpoints.weights import with_current_names
from tessellar.training.sharding import by_kind, like, whole


class EMA(L.Callback):
    """Average after every update. Weights that are not finite are never averaged in.

    Without `warmup` the decay is the same from the first update on: a run that is short against 1 /
    (1 - decay) updates then keeps much of its first weights. Averages with the decays `also` are
    kept beside it, for `evaluate.py sweep RUN.ckpt --ema`; nothing else reads them.
    """

    def __init__(
        self, decay: float = 0.9999, warmup: bool = True, also: Sequence[float] = ()
    ) -> None:
        for one in (decay, *also):
            if not 0 <= one < 1:
                raise ValueError(f"EMA decay is {one}; it must be in [0, 1)")
        if len({decay, *also}) < 1 + len(also):
            raise ValueError(f"EMA decays {[decay, *also]} name one twice")
        self.decay = decay
        self.warmup = warmup
        self.further: dict[float, dict[str, Tensor]] = {one: {} for one in also}
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._seen = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for averages in (self.average, *self.further.values()):
            if averages:
                continue
            # An average that joins a run later starts from the weights of then.
            for name, tensor in tensors_of(pl_module).items():
                average = tensor.float() if tensor.is_floating_point() else tensor
                averages[name] = average.clone()
        self._place(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._place(pl_module)  # a sharded run reads its checkpoint after on_fit_start
        self._seen = pl_module.updates

    def _place(self, pl_module: L.LightningModule) -> None:
        """Averages where the weights are, and sharded as they are."""
        self.average = self._placed(pl_module, self.average)
        for decay, averages in self.further.items():
            self.further[decay] = self._placed(pl_module, averages)

    def _placed(
        self, pl_module: L.LightningModule, averages: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        saved = with_current_names(pl_module.ema_target, averages)  # type: ignore[arg-type]
        placed = {}
        for name, tensor in tensors_of(pl_module).items():
            average = saved[name].float() if tensor.is_floating_point() else saved[name]
            placed[name] = like(average, tensor)
        return placed

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if pl_module.updates == self._seen:
            return
        self._seen = pl_module.updates
        tensors = tensors_of(pl_module)
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        is_finite = all_finite(floats)
        if is_finite.device.type == "cpu" and not is_finite:
            return
        self.updates += 1
        self._update(self.decay, self.average, tensors, is_finite)
        for decay, average in self.further.items():
            self._update(decay, average, tensors, is_finite)

    def _update(
        self, decay: float, kept: dict[str, Tensor], tensors: dict[str, Tensor], is_finite: Tensor
    ) -> None:
        """Bring new weights into one average, where the device finds them finite: the host does not
        wait for it to say so.
        """
        new: list[Tensor] = []
        averages: list[Tensor] = []
        counters: list[tuple[Tensor, Tensor]] = []  # whole numbers are copied, not averaged
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                new.append(tensor)
                averages.append(kept[name])
            else:
                counters.append((kept[name], tensor))
        # average += (1 - decay) (weights - average)
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        for ours, theirs in zip(by_kind(averages), by_kind(new), strict=True):
            theirs = [tensor.float() for tensor in theirs]
            if is_finite.device.type != "cpu":
                pairs = zip(ours, theirs, strict=True)
                theirs = [torch.where(is_finite, new, average) for average, new in pairs]
            torch._foreach_lerp_(ours, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for ours, counter in counters:
            ours.copy_(counter)

    @contextmanager
    def swapped(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Averaged weights inside, raw weights again outside; nested uses do nothing."""
        outermost = self._raw is None
        self._swap_in(pl_module)
        try:
            yield
        finally:
            if outermost:
                self._swap_out(pl_module)

    def _swap_in(self, pl_module: L.LightningModule) -> None:
        if self._raw is not None or not self.average:
            return
        self._place(pl_module)
        target: nn.Module = pl_module.ema_target  # type: ignore[assignment]
        self._raw = {name: tensor.clone() for name, tensor in tensors_of(pl_module).items()}
        target.load_state_dict(self.average)

    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._raw is not None:
            pl_module.ema_target.load_state_dict(self._raw)  # type: ignore[union-attr, operator]
            self._raw = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_predict_start = on_validation_start
    on_predict_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "decay": self.decay,
            "updates": self.updates,
            "average": dict(self.average),
        }
        if self.further:
            state["further"] = {}
            for decay, averages in self.further.items():
                state["further"][repr(decay)] = dict(averages)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self.average = state_dict["average"]
        for decay, averages in state_dict.get("further", {}).items():
            if float(decay) in self.further:
                self.further[float(decay)] = averages


def tensors_of(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """What is averaged: parameters and buffers of the module's `ema_target`."""
    state = pl_module.ema_target.state_dict()  # type: ignore[union-attr, operator]
    return {name: tensor.detach() for name, tensor in state.items()}


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all are finite, a bool on their device; the same on all processes of a sharded run."""
    norms = []
    for kind in by_kind(tensors):
        # One norm of all norms is NaN or infinite where any value is.
        norms.append(whole(torch.stack(torch._foreach_norm(kind)).norm()))  # pyright: ignore[reportPrivateImportUsage]
    return torch.isfinite(torch.stack(norms).norm())
