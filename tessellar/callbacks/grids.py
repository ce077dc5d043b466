"""Sample and reconstruction grids in the run's folder and in its loggers, after each validation."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from tessellar.images import to_uint8
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.output import save_png, tile
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner
from tessellar.training.runs import LateTensorBoard, Run


class Grids(L.Callback):
    """Originals above their reconstructions for a tokenizer; samples with fixed seeds for a
    generator.

    A class-conditional generator shows one row a class, one that reads text the first captions of
    the validation set.
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
            pairs = torch.stack([to_uint8(x) for x in self._first], 1)
            rows = [
                row.transpose(0, 1).flatten(0, 1)
                for row in pairs.split(self.columns)
                if len(row) == self.columns
            ]
            self._save(
                trainer,
                pl_module,
                "reconstructions",
                torch.cat(rows) if rows else pairs.flatten(0, 1),
            )
        elif hasattr(pl_module, "model") and self._can_sample(pl_module.model.conditioner):
            self._save(trainer, pl_module, "samples", self._samples(pl_module))

    def _can_sample(self, conditioner: Any) -> bool:
        texts = isinstance(conditioner, TextConditioner) and bool(self._captions)
        return texts or isinstance(conditioner, ClassConditioner)

    def _samples(self, pl_module: Any) -> Tensor:
        if isinstance(pl_module.model.conditioner, TextConditioner):
            condition = pl_module.model.conditioner.of_texts(self._captions)
            return to_uint8(
                pl_module.model.sample(condition, self.sampling, range(condition.batch))
            ).cpu()
        classes = range(min(pl_module.model.conditioner.num_classes, 10))
        labels = [c for c in classes for _ in range(self.columns)]
        condition = pl_module.model.class_condition(labels)
        return to_uint8(pl_module.model.sample(condition, self.sampling, range(len(labels)))).cpu()

    def _save(self, trainer: L.Trainer, pl_module: Any, name: str, images: Tensor) -> None:
        grid = tile(images, self.columns)
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
