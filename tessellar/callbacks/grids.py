"""Sample and reconstruction grids in the run's folder and in its loggers, after each validation."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import lightning as L
from torch import Tensor

from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.sampling.grid import picture_grid
from tessellar.sampling.output import save_png
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner
from tessellar.training.runs import LateTensorBoard, Run

MOST_CLASSES = 10


@in_ranges
class Grids(L.Callback):
    """Originals above their reconstructions for a tokenizer; samples with fixed seeds for a
    generator.

    A class-conditional generator shows one row a class, one that reads text the first captions of
    the validation set; a drafter shows none.
    """

    def __init__(self, run: Run, sampling: Sampling, columns: int = 8) -> None:
        self.run = run
        self.sampling = sampling
        self.columns = columns
        self._first: tuple[Tensor, Tensor] | None = None
        self._captions: list[str] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._captions = batch.get("caption", [])[: 4 * self.columns]
        if batch_idx == 0 and "reconstruction" in outputs:
            self._first = (
                batch["image"][: 4 * self.columns].cpu(),
                outputs["reconstruction"][: 4 * self.columns].cpu(),
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        if self._first is not None:
            self._save(trainer, pl_module, "reconstructions", self._pairs(*self._first))
            return
        model = getattr(pl_module, "model", None)
        if isinstance(model, ImageGenerator) and not model.generator.draws_alone:
            return
        conditioner = getattr(model, "conditioner", None)
        reads_captions = isinstance(conditioner, TextConditioner) and bool(self._captions)
        if isinstance(conditioner, ClassConditioner) or reads_captions:
            self._save(trainer, pl_module, "samples", self._samples(model))

    def _pairs(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Rows of originals, each above the row of its reconstructions."""
        above = to_uint8(originals).split(self.columns)
        below = to_uint8(reconstructions).split(self.columns)
        rows = list(chain.from_iterable(zip(above, below, strict=True)))
        return picture_grid(rows, row_labels=["original", "reconstruction"] * len(above))

    def _samples(self, model: Any) -> Tensor:
        """A row a class, or one image a caption; image i is always drawn from seed i."""
        if isinstance(model.conditioner, TextConditioner):
            rows = self._rows(model, model.conditioner.of_texts(self._captions))
            starts = range(0, len(self._captions), self.columns)
            captions = [self._captions[start : start + self.columns] for start in starts]
            return picture_grid(rows, captions=captions)
        classes = range(min(model.conditioner.num_classes, MOST_CLASSES))
        labels = sorted([*classes] * self.columns)
        names = model.class_names or list(map(str, classes))
        rows = self._rows(model, model.class_condition(labels))
        return picture_grid(rows, row_labels=names[: len(rows)])

    def _rows(self, model: Any, condition: Condition) -> Sequence[Tensor]:
        images = to_uint8(model.sample(condition, self.sampling, range(condition.batch))).cpu()
        return images.split(self.columns)

    def _save(self, trainer: L.Trainer, pl_module: Any, name: str, grid: Tensor) -> None:
        folder = self.run.folder / "pictures"
        folder.mkdir(exist_ok=True)
        save_png(grid, folder / f"{name}_{pl_module.updates:07d}.png")
        for logger in trainer.loggers:
            log_image(logger, name, grid, pl_module.updates)


def log_image(logger: Any, name: str, image: Tensor, step: int) -> None:
    """A uint8 picture [3, H, W] to TensorBoard or wandb; loggers without pictures are left out."""
    if isinstance(logger, LateTensorBoard):
        logger.log_picture(name, image, step)
    elif type(logger).__name__ == "WandbPage":
        logger.log_image(name, [image.permute(1, 2, 0).numpy()], step=step)
