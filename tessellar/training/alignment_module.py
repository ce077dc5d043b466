"""Alignment: a generator that is already trained, made better by a method of
`tessellar.training.alignment`.

The run starts from an export, which brings tokenizer, generator and conditioner: the YAML says only
the method, so one YAML serves any generator that is trained by teacher forcing. Its own export is
one of a generator again.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessellar import distributed
from tessellar.checkpoints.data_facts import other_class
from tessellar.data.batch import Batch as DataBatch
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.networks.facts import sha256_of
from tessellar.pipeline import load_generator
from tessellar.protocol.arguments import in_ranges
from tessellar.schedules import Schedule
from tessellar.training.alignment.method import AlignmentMethod, Batch
from tessellar.training.alignment.rewards import Material
from tessellar.training.base import Player, trainable
from tessellar.training.generator_module import ImageGeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.speed import checkpoint_activations, compile_each_block

METHOD_KEY = "alignment_method"
AT_ONCE = 64  # images that a reward's preparation reads or draws


@in_ranges
class AlignmentModule(ImageGeneratorModule):
    """Align the generator at `source` (an export, a checkpoint or a hub id) by `method`.

    Averaged weights are taken where the source has some. Only what the method says is trained, by
    default the generator. Raises UserError for data of other classes than the generator's, and for
    a reward that asks a network with which the run is measured.
    """

    def __init__(
        self,
        source: str,
        method: AlignmentMethod,
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-6, betas=(0.9, 0.999)),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        clip: float | None = 1.0,
        accumulate: int = 1,
        max_skipped: int = 10,
        checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(clip, accumulate, max_skipped)
        self.source = source
        with torch.device("cpu"):  # also where sizes are tried on the meta device
            self.model = load_generator(source)
        self.model.tokenizer.looks_at_range = False
        self.model.train()
        self.method = method
        method.attach(self.model)
        self.optimizer_settings = optimizer
        self.schedule = schedule
        if checkpointing:
            checkpoint_activations(self.model.generator)
        if compile_blocks:
            compile_each_block(self.model.generator)

    @property
    def ema_target(self) -> nn.Module:
        return getattr(self.model, self.method.trained)

    @property
    def averaged(self) -> str:  # type: ignore[override]
        return self.method.trained

    def make_players(self) -> list[Player]:
        target = self.ema_target
        optimizers = self.optimizer_settings.make(target)
        modules = [target, *self.method.rewards]
        return [Player(self.method.trained, modules, trainable(target), optimizers, self.schedule)]

    def hint_of_classes(self, count: int) -> str:
        return ": alignment keeps the classes of its generator"

    def check_data(self, data: ImageDataModule) -> None:
        super().check_data(data)
        difference = other_class(self.class_names, tuple(data.class_names))
        if self.reads_labels and self.class_names and difference is not None:
            raise UserError(
                f"{self.source} was trained on other classes: {difference}; alignment keeps them"
            )

    def setup(self, stage: str) -> None:
        """Take the names of classes where the source had none; look at the networks of rewards."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(data, ImageDataModule):
            return
        self.refuse_judges()
        if self.reads_labels and not self.class_names:
            self.model.class_names = tuple(data.class_names)

    def refuse_judges(self) -> None:
        """Raise UserError where a reward asks a network with which a callback measures this run."""
        judges = {}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            file = Path(getattr(callback, "extractor_source", ""))
            if file.is_file():
                judges[sha256_of(file)] = file
        for reward in self.method.rewards:
            for file in reward.files:
                judge = judges.get(sha256_of(file)) if judges else None
                if judge is not None:
                    raise UserError(
                        f"{type(reward).__name__} asks the network {file}, with which this run is measured "
                        f"({judge}): a reward needs another one"
                    )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        names = self.class_names if self.reads_labels else ()
        for reward in self.method.rewards:
            reward.prepare(Material(names, self.real_images, self.own_images))

    def training_samples(self, count: int) -> Iterator[DataBatch]:
        """Batches of at most `count` training samples, not augmented, that lie evenly in the set."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise UserError(f"a reward finds no images in the data {type(data).__name__}")
        dataset = data.train_dataset(augment=False)
        step = max(1, len(dataset) // count)
        chosen = list(islice(range(0, len(dataset), step), count))
        for start in range(0, len(chosen), AT_ONCE):
            yield dataset.batch(chosen[start : start + AT_ONCE])

    def real_images(self, count: int) -> Iterator[Tensor]:
        """At most `count` training images."""
        for batch in self.training_samples(count):
            if "image" not in batch:
                raise UserError("a reward compares with real images; the data gives cached tokens")
            yield batch["image"].to(self.device)

    def own_images(self, count: int) -> Iterator[Tensor]:
        """At most `count` images of the generator, under conditions of the training set; the same on
        every process.
        """
        drawn = 0
        for batch in self.training_samples(count):
            condition = self.model.conditioner(dict(batch)).to(self.device)
            seeds = range(drawn, drawn + condition.batch)
            drawn += condition.batch
            tokens = self.model.sample_tokens(condition, self.method.sampling, seeds)
            yield self.model.decode(tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[METHOD_KEY] = distributed.all_gather(self.method.kept())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a method keeps is each process's own: another number of them begins anew."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get(METHOD_KEY, [])
        if len(kept) == distributed.world_size():
            self.method.put_back(kept[distributed.rank()])

    def training_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        tokens = self.tokens_of(batch)
        progress = self.updates / self.total_updates
        part = self.batches % self.accumulate
        condition = self.model.conditioner(batch)
        given = Batch(tokens, condition, batch, progress, self.updates, part)
        made = self.method.terms(self.model, given)
        total = torch.stack(list(made.losses.values())).sum()
        self.backward_and_step(self.players[0], total)
        self.log_terms("train", {"loss": total, **made.losses, **made.logged}, len(tokens))
        self.finish_batch(len(tokens))
        return {"loss": total.detach(), "tokens": tokens}
