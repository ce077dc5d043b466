"""Pictures at the end of training: samples beside their nearest training images, and the run's
curves.

Reconstructions and class grids during training are `grids.py`. Files go to `pictures/` in the run's
folder, and to the loggers that take pictures.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tessellar.callbacks.ema import EMA
from tessellar.callbacks.grids import log_image
from tessellar.data.datamodule import ImageDataModule
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.pictures import Embed, metric_curves, nearest, neighbour_grid, pixels
from tessellar.evaluation.sources import DatasetImages
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.output import save_png
from tessellar.sampling.run import Drawing, balanced_labels
from tessellar.sampling.settings import Sampling
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.sharding import gathered


@in_ranges
class Pictures(L.Callback):
    """`samples` images, each beside the `neighbours` training images nearest in `extractor`'s
    features or in pixels.
    """

    def __init__(
        self,
        samples: int = 10,
        neighbours: int = 7,
        extractor: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.samples = samples
        self.neighbours = neighbours
        self.extractor = extractor
        self.sampling = sampling
        self.seed = seed
        self.batch_size = batch_size

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        model = getattr(pl_module, "model", None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(model, ImageGenerator) and isinstance(data, ImageDataModule):
            if isinstance(model.conditioner, ClassConditioner) and model.generator.draws_alone:
                self._neighbours(trainer, pl_module, data, folder)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile) and trainer.is_global_zero:
                if logger.path.is_file():
                    metric_curves(logger.path, folder / "curves.png")

    def _neighbours(
        self, trainer: L.Trainer, pl_module: Any, data: ImageDataModule, folder: Path
    ) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        with ema.swapped(pl_module) if ema else nullcontext(), gathered(pl_module):
            samples = self._samples(pl_module.model)
        train = DatasetImages(data.train_dataset(augment=False), data.name, "train")
        found = nearest(
            samples, train, self.neighbours, self._embed(pl_module.device), self.batch_size
        )
        if trainer.is_global_zero:
            picture = neighbour_grid(samples, found)
            save_png(picture, folder / "neighbours.png")
            for logger in trainer.loggers:
                log_image(logger, "neighbours", picture, trainer.global_step)

    def _samples(self, model: ImageGenerator) -> Tensor:
        """uint8 [n, 3, H, W], going round the classes; the same on every rank."""
        assert isinstance(model.conditioner, ClassConditioner)
        labels = balanced_labels(self.samples, model.conditioner.num_classes)
        drawn = []
        for _, images in Drawing(self.sampling, self.seed).of_classes(model, labels):
            drawn.append(images)
        return torch.cat(drawn)

    def _embed(self, device: torch.device) -> Embed:
        if self.extractor is None:
            return pixels
        extractor = load_extractor(self.extractor).to(device)
        return lambda images: extractor(images).features
