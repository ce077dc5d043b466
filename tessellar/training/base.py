"""TrainingModule: one training loop body for all systems, under manual optimisation.

Lightning's automatic optimisation takes one optimizer and, with two, refuses clipping and
accumulation and counts every optimizer's step. Here each *update* accumulates `accumulate` batches,
clips, skips non-finite gradients and steps; only the first optimizer goes through Lightning, so
`global_step` and `max_steps` count updates, not optimizers.

A checkpoint also holds what Lightning leaves out: the samples consumed, the random numbers' states,
gradients of an update that is under way. So a resumed run equals an uninterrupted one bit for bit,
wherever it was interrupted.
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tessellar import distributed
from tessellar.checkpoints.card import Record
from tessellar.checkpoints.data_facts import DATA_KEY, DataFacts
from tessellar.checkpoints.description import HEADER_KEY, checkpoint_header
from tessellar.checkpoints.export import export_parts
from tessellar.checkpoints.frozen import put_back
from tessellar.checkpoints.weights import current_names, with_current_names
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.layers.tags import tag, tags
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.randomness import derive
from tessellar.schedules import Schedule
from tessellar.training import random_state
from tessellar.training.facts import Facts, count_parameters
from tessellar.training.optim import set_factor, set_weight_decay
from tessellar.training.optimizer_names import arrange, former_names, names_by_place
from tessellar.training.sharding import (
    average_gradients,
    clip_gradients,
    data_share,
    gather,
    like,
    mesh_of,
    scatter,
    settle,
    tensor_mesh_of,
    whole,
)

log = logging.getLogger(__name__)
STATE_KEY = "training_state"
COUNTERS = ("batches", "updates", "skipped", "epoch", "epoch_samples")


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had no finite gradient."""


class Verdict:
    """Whether an update was made, decided on a device, and read without waiting for what that device
    was given since.
    """

    def __init__(self, is_finite: Tensor, update: int) -> None:
        self.update = update
        self._event: torch.cuda.Event | None = None
        self._value = is_finite
        if is_finite.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(is_finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """Wait for the device to come to this update."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class Player(NamedTuple):
    """Who trains together: modules, what of them is trained, optimizers and schedule (a generator,
    a discriminator).

    The schedule counts updates of the run from `start`, and lasts to the run's end.
    """

    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    optimizers: list[Optimizer]
    schedule: Schedule
    start: int = 0


class TrainingModule(L.LightningModule, ABC):
    """Base of the tokenizer and the generator module.

    `batches` and `updates` count what the run has seen, `epoch` and `epoch_samples` (over all
    processes) where it is in the data; `skipped` are the updates of one player that were left out
    because its loss or gradient was not finite, and `max_skipped` of them in a row stop the run. A
    skipped update is counted, and leaves weights, optimizers and what forward passes write (codes,
    statistics) as they were. A subclass returns its loss under `loss` and its tokens under `tokens`
    from `training_step`.
    """

    #: The validation metric that the best checkpoint is chosen by, and whether the `min` or `max` of it is best.
    best_by: tuple[str, Literal["min", "max"]] = ("val/loss", "min")
    #: The share of codes in use below which a run is warned of a collapse; 0: never.
    least_codes_used: float = 0.0
    #: Whether a backward pass leaves out what another one trains, which plain `ddp` refuses.
    takes_turns: bool = False
    #: Whether the labels of the data are read, so that validation too needs the classes of training.
    reads_labels: bool = False
    #: Names of the classes that an export numbers, where they are known.
    class_names: tuple[str, ...] = ()
    #: Name of the part that averages are kept of, where it is not the one that the kind is named after.
    averaged: str | None = None
    tokenizer: Tokenizer

    def __init__(self, clip: float | None, accumulate: int, max_skipped: int) -> None:
        super().__init__()
        if accumulate < 1 or max_skipped < 1 or (clip is not None and not 0 < clip < float("inf")):
            raise ValueError(
                f"accumulate is {accumulate}, max_skipped {max_skipped}, clip {clip}: the first two are at least 1, "
                "clip above 0 or null"
            )
        self.automatic_optimization = False
        self.clip = clip
        self.accumulate = accumulate
        self.max_skipped = max_skipped
        self.batches = 0
        self.updates = 0
        self.skipped = 0
        self.epoch = 0
        self.epoch_samples = 0
        self._skipped_in_a_row: dict[str, int] = {}
        self._verdicts: dict[str, Verdict] = {}
        # Of each player, at the start of the update under way.
        self._written_before: dict[str, list[Tensor]] = {}
        self._to_restore: dict[str, Any] = {}
        self._loaded_optimizers: dict[str, Any] | None = None
        self._random_before_validation: list[random_state.State] | None = None
        self.players: list[Player] = []
        # Called with a player whose gradient holds one batch more, before it is clipped.
        self.gradient_watchers: list[Callable[[TrainingModule, Player], None]] = []
        self.is_sharded = False
        self._size_between: tuple[int, int] | None = None
        self.data_facts: DataFacts | None = None
        self._tags: dict[str, set[str]] = {}

    @property
    @abstractmethod
    def ema_target(self) -> nn.Module:
        """The sub-module that exponential averages are kept of."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module | None]:
        """What an export and the header of a checkpoint hold, by the names of
        `checkpoints/description.py`.
        """

    def frozen_parts(self) -> dict[str, nn.Module]:
        """What no update changes, by its prefix in the state dict: a run's checkpoints share one
        copy of it.
        """
        return {}

    def export(self, folder: str | Path, record: Record) -> Path:
        """Write the export of the model as it is now, in the place of an older one."""
        names = self.class_names
        return export_parts(self.parts(), folder, record=record, overwrite=True, class_names=names)

    def facts(self) -> Facts:
        """What a run will cost by its sizes alone; on any device, the meta device included."""
        trained, frozen = count_parameters(self)
        return Facts(trained, frozen, self.tokenizer.layout.length)

    def check_data(self, data: ImageDataModule) -> None:
        """Raise UserError, before a run begins, for data that this module cannot be trained on."""
        size = self.tokenizer.image_size
        if tuple(size) != tuple(data.image_size):
            raise UserError(
                f"the tokenizer takes images of {size}; the data set {data.name} gives {data.image_size}"
            )
        for bucket in data.buckets:  # raises where one cannot be taken
            self.take_size(bucket)
        self.take_size(size)

    def take_size(self, image_size: tuple[int, int]) -> None:
        """Let what is trained take images of another size: batches of data in buckets have several."""
        self.tokenizer.take_size(image_size)

    def _take_size_of(self, batch: Any) -> None:
        """Follow the images of a batch, until `_take_back`: outside of steps the size is the run's."""
        images = batch.get("image") if isinstance(batch, Mapping) else None
        if isinstance(images, Tensor) and images.shape[-2:] != self.tokenizer.image_size:
            self._size_between = self.tokenizer.image_size
            self.take_size((images.shape[-2], images.shape[-1]))

    def _take_back(self) -> None:
        if self._size_between is not None:
            self.take_size(self._size_between)
            self._size_between = None

    @abstractmethod
    def make_players(self) -> list[Player]:
        """Parameters with their optimizers, main one first."""

    def configure_optimizers(self) -> list[Optimizer]:
        for name, parameter in self.named_parameters() if self.is_sharded else ():
            tag(parameter, *self._tags[name])
        self.players = self.make_players()
        settle(self._all_optimizers)
        return self._all_optimizers

    def shard_over(self, mesh: DeviceMesh) -> None:
        """Shard what is trained over the processes of `mesh` (FSDP2)."""
        raise UserError(
            f"{type(self).__name__} cannot be sharded; train it with --trainer.strategy ddp"
        )

    def split_over(self, mesh: DeviceMesh) -> None:
        """Split the matrices of what is trained over the processes of `mesh` (tensor parallelism)."""
        raise UserError(
            f"{type(self).__name__} has no plan of tensor parallelism; leave tensor_parallel_size at 1"
        )

    def configure_model(self) -> None:
        mesh = mesh_of(self.trainer.strategy)
        if mesh is not None and not self.is_sharded:
            for tensor in self.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
            self._tags = {name: tags(parameter) for name, parameter in self.named_parameters()}
            across = tensor_mesh_of(self.trainer.strategy)
            if across is not None:
                self.split_over(across)
            self.shard_over(mesh)
            self.is_sharded = True

    def on_fit_start(self) -> None:
        """Draws of dropout differ between processes; the first one draws as a run of one process
        does.

        It also looks at the data, since it is the one that writes checkpoints.
        """
        data = getattr(self.trainer, "datamodule", None)
        if self.global_rank == 0 and isinstance(data, ImageDataModule):
            self.data_facts = data.facts()
        share = data_share(self.trainer.strategy)
        rank = self.global_rank if share is None else share[0]
        if rank > 0:
            torch.manual_seed(derive(torch.initial_seed(), rank))
        self._arrange_optimizer_states()

    @property
    def total_updates(self) -> int:
        """Length of the run in updates, for schedules; huge where the run has no end."""
        steps = self.trainer.max_steps
        epochs = self.trainer.max_epochs
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
        self.add_gradient(loss)
        self.step(player)

    def add_gradient(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, of one batch.

        A loss that is not finite makes the whole gradient NaN, so that every process skips the same
        update.
        """
        weight = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self.manual_backward(loss * weight / self.accumulate)

    def step(self, player: Player) -> None:
        """On the last batch of an update: clip the gradients of a player and step."""
        for watcher in self.gradient_watchers:
            watcher(self, player)
        if self.is_sharded:
            average_gradients([p for p in player.parameters if not isinstance(p, DTensor)])
        if not self.at_boundary:
            return
        norm = clip_gradients(player.parameters, self.clip or float("inf"))
        factor = player.schedule.factor(
            self.updates - player.start, self.total_updates - player.start
        )
        self.log_train(
            {f"train/grad_norm_{player.name}": norm, f"train/lr_factor_{player.name}": factor}
        )
        is_finite = torch.isfinite(norm)
        if self.decides_on_device(player, norm.device):
            self._step_where(player, factor, is_finite)
        elif bool(is_finite):
            self._skipped_in_a_row[player.name] = 0
            self._step(player, factor)
        else:
            self.skip_update(player)
        for optimizer in player.optimizers:
            optimizer.zero_grad()

    def decides_on_device(self, player: Player, device: torch.device) -> bool:
        """Whether an update is left out by the optimizers' own kernels, so that the host need not
        wait for the gradient; it then hears of it one update later.
        """
        if device.type == "cpu":
            return False
        return all(optimizer.defaults.get("fused") for optimizer in player.optimizers)

    def _step(self, player: Player, factor: float) -> None:
        """One step of a player's optimizers, with the learning rate and weight decay of now."""
        set_factor(player.optimizers, factor)
        if player.schedule.final_weight_decay is not None:
            step = self.updates - player.start
            total = self.total_updates - player.start
            decay = partial(player.schedule.weight_decay, step=step, total=total)
            set_weight_decay(player.optimizers, decay)
        for number, optimizer in enumerate(player.optimizers):
            # Lightning counts one update a batch: the first optimizer of the first player.
            if player is self.players[0] and number == 0:
                self._lightning_optimizer().step()
            else:
                optimizer.step()

    def _step_where(self, player: Player, factor: float, is_finite: Tensor) -> None:
        """As `_step` where the device finds `is_finite` true, and as `skip_update` elsewhere."""
        self._hear(player.name)
        for optimizer in player.optimizers:
            # Of torch's loss scaling: fused kernels change nothing where it is 1.
            optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self._step(player, factor)
        with torch.no_grad():
            kept = self._written_before.get(player.name, [])
            for tensor, before in zip(written(player), kept, strict=False):
                tensor.copy_(torch.where(is_finite, tensor, before))
        self._verdicts[player.name] = Verdict(is_finite, self.updates)

    def _hear(self, *names: str) -> None:
        """Count what the device has decided of the last updates of players."""
        for name in names:
            verdict = self._verdicts.pop(name, None)
            if verdict is None:
                continue
            if verdict.read():
                self._skipped_in_a_row[name] = 0
            else:
                self._count_skipped(name, verdict.update)

    def _lightning_optimizer(self) -> LightningOptimizer:
        first = self.optimizers()
        return first[0] if isinstance(first, list) else first  # type: ignore[return-value]

    def skip_update(self, player: Player) -> None:
        """Leave the update out: codes and statistics are put back; Lightning counts it all the
        same.
        """
        with torch.no_grad():
            kept = self._written_before.get(player.name, [])
            for tensor, before in zip(written(player), kept, strict=False):
                tensor.copy_(before)
        if player is self.players[0]:
            counting = self._lightning_optimizer()
            counting._on_before_step()
            counting._on_after_step()
        self._count_skipped(player.name, self.updates)

    def _count_skipped(self, name: str, update: int) -> None:
        """Say that an update was left out; raises NonFiniteGradients after too many in a row."""
        self.skipped += 1
        in_a_row = self._skipped_in_a_row[name] = self._skipped_in_a_row.get(name, 0) + 1
        log.warning(
            "update %d: gradient of the %s is not finite, skipped (%d so far)",
            update,
            name,
            self.skipped,
        )
        if in_a_row >= self.max_skipped:
            whole = str(self.trainer.precision) == "32-true"
            hint = "" if whole else " or use precision 32-true"
            raise NonFiniteGradients(
                f"{in_a_row} updates in a row of the {name} had no finite gradient, the last is update {update}; "
                f"lower the learning rate{hint}"
            )

    def finish_batch(self, samples: int) -> None:
        """Count the batch of `samples` (in this process), the update where it ends one, and the
        place in the data.
        """
        if self.at_boundary:
            self.updates += 1
        self.batches += 1
        share = data_share(self.trainer.strategy)
        self.epoch_samples += samples * (distributed.world_size() if share is None else share[1])
        if self.trainer.is_last_batch:
            self.epoch = self.epoch + 1
            self.epoch_samples = 0

    @property
    def logs_now(self) -> bool:
        """Whether the current batch is one whose metrics are written; others are not even handed to
        Lightning.
        """
        return (self.batches + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def log_train(self, values: Mapping[str, Tensor | float]) -> None:
        """Log metrics of a training batch, at the number of updates made with it."""
        if self.logs_now:
            values = {"step": float(self.updates + self.at_boundary), **values}
            self.log_dict(values, sync_dist=self.trainer.world_size > 1)

    def log_terms(
        self, stage: Literal["train", "val"], terms: Mapping[str, Tensor], size: int
    ) -> None:
        """Log named terms of a batch of `size`; in validation as a mean over samples and processes."""
        values = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        if stage == "train":
            self.log_train(values)
        else:
            # Lightning rounds the mean over processes of the number of samples down; of a multiple
            # it is exact.
            self.log_dict(values, batch_size=size * self.trainer.world_size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        # Where loggers place the validation's metrics.
        self.log("step", float(self.updates))

    def on_validation_model_zero_grad(self) -> None:
        """Lightning frees gradients before a validation; those of an update that is under way have
        to stay.
        """
        if self.batches % self.accumulate == 0:
            super().on_validation_model_zero_grad()

    def on_validation_start(self) -> None:
        """Validation may draw random numbers; training goes on as if it had drawn none."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._random_before_validation = random_state.capture_all()
        gather(self)

    def on_validation_end(self) -> None:
        scatter(self)
        if self._random_before_validation is not None:
            random_state.restore_own(self._random_before_validation)
            self._random_before_validation = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put back what has to be in place when the first batch after a resume begins, and not
        earlier.
        """
        self._take_size_of(batch)
        gradients = self._to_restore.pop("gradients", {})
        for name, parameter in self.named_parameters() if gradients else ():
            if name in gradients:
                parameter.grad = like(gradients[name].to(parameter.dtype), parameter)
        if "random" in self._to_restore:
            random_state.restore_own(self._to_restore.pop("random"))
        if self.batches % self.accumulate == 0:
            self._written_before = {}
            for player in self.players:
                before = [tensor.detach().clone() for tensor in written(player)]
                self._written_before[player.name] = before

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._take_back()

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._take_size_of(batch)

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._take_back()

    def on_train_end(self) -> None:
        self._hear(*list(self._verdicts))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._hear(*list(self._verdicts))
        gradients = {}
        written_before = {}
        if self.batches % self.accumulate:  # an update is under way
            written_before = self._written_before
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = whole(parameter.grad)
        checkpoint[STATE_KEY] = {
            **{name: getattr(self, name) for name in COUNTERS},
            "skipped_in_a_row": dict(self._skipped_in_a_row),
            "random": self._random_before_validation or random_state.capture_all(),
            "gradients": gradients,
            "written_before": written_before,
            "parameters": names_by_place(self._all_optimizers, self),
        }
        if self.data_facts is not None:
            checkpoint[DATA_KEY] = self.data_facts.as_dict()
        checkpoint[HEADER_KEY] = checkpoint_header(self.parts(), self.averaged)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        came_from = None if self._trainer is None else self.trainer.ckpt_path
        folder = None if came_from is None else Path(came_from).parent
        put_back(checkpoint, came_from or "this checkpoint", folder, self.frozen_parts())
        checkpoint["state_dict"] = with_current_names(self, checkpoint["state_dict"])
        state = dict(checkpoint.get(STATE_KEY, {}))
        if STATE_KEY in checkpoint and "optimizer_states" in checkpoint:
            self._loaded_optimizers = checkpoint
        # Then a checkpoint is read after the optimizers are made; else before, and before a fit.
        if self.is_sharded:
            self._arrange_optimizer_states()
        self._skipped_in_a_row = dict(state.pop("skipped_in_a_row", {}))
        self._to_restore = {}
        if "random" in state:
            self._to_restore["random"] = state["random"]
        if "gradients" in state:
            self._to_restore["gradients"] = with_current_names(self, state["gradients"])
        self._written_before = {}
        for name, tensors in state.get("written_before", {}).items():
            self._written_before[name] = [tensor.to(self.device) for tensor in tensors]
        for name in COUNTERS:
            setattr(self, name, state.get(name, 0))
        if STATE_KEY in checkpoint and "loops" in checkpoint:
            self.place_loops(checkpoint["loops"]["fit_loop"])

    @property
    def _all_optimizers(self) -> list[Optimizer]:
        optimizers: list[Optimizer] = []
        for player in self.players:
            optimizers += player.optimizers
        return optimizers

    def _arrange_optimizer_states(self) -> None:
        """Put the states of a loaded checkpoint in the order of this run's optimizers, before
        Lightning restores them.

        Those from before names were listed are in the order that the groups had then.
        """
        checkpoint = self._loaded_optimizers
        self._loaded_optimizers = None
        if checkpoint is None:
            return
        names = checkpoint[STATE_KEY].get("parameters")
        if names is None:
            names = former_names(self._all_optimizers, self)
        names = [current_names(self, of_one) for of_one in names]
        checkpoint["optimizer_states"] = arrange(
            checkpoint["optimizer_states"], names, self._all_optimizers, self
        )

    def place_loops(self, loop: dict[str, Any]) -> None:
        """Tell Lightning's loops where the run is: over several resumes they lose count of epochs, and at the end of
        one they do not say in which state they were saved."""
        begun = self.epoch_samples > 0
        for part in loop["epoch_progress"].values():
            part.update(ready=self.epoch + begun, started=self.epoch + begun)
            part.update(processed=self.epoch, completed=self.epoch)
        if not begun:
            batches = loop["epoch_loop.batch_progress"]
            batches["total"].update(dict.fromkeys(batches["total"], self.batches))
            batches["current"].update(dict.fromkeys(batches["current"], 0))
            batches["is_last_batch"] = False


def written(player: Player) -> list[Tensor]:
    """What forward passes of a player's modules may write: buffers that a checkpoint holds,
    parameters tagged so.
    """
    found: list[Tensor] = []
    for part in chain.from_iterable(module.modules() for module in player.modules):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                found.append(buffer)
        for parameter in part._parameters.values():
            if parameter is not None and "written" in tags(parameter):
                found.append(parameter)
    return found


def trainable(*modules: nn.Module | None) -> list[nn.Parameter]:
    """Parameters of modules that take gradients."""
    found: list[nn.Parameter] = []
    for module in modules:
        if module is not None:
            found += [p for p in module.parameters() if p.requires_grad]
    return found
