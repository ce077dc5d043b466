"""FID: a Fréchet distance (or any metric of the engine) while training, on averaged weights, also
for best.ckpt.

A generator is measured by class-balanced samples against the data set, a tokenizer by
reconstructions of validation images (rFD). The name logged is the network's: `val/FID-10k`,
`val/FD(fmnist-resnet10t)`; `val/distance` is the same number under a name that fits into file
names. Each measurement also leaves its record in the run's folder.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L

from tessellar.callbacks.ema import EMA
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import GeneratedImages, Reconstructions
from tessellar.evaluation.metrics import check_metrics
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.protocols import Metric
from tessellar.evaluation.record import Record, write_record
from tessellar.evaluation.references import Reference, load_reference, reference_from
from tessellar.evaluation.sources import DatasetImages, ImageSource
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import in_ranges
from tessellar.sampling.settings import Sampling
from tessellar.training.sharding import gathered

MONITOR = "val/distance"


@in_ranges
class FID(L.Callback):
    """Measure every `every_n_epochs` epochs, or every `every_n_updates` updates.

    `extractor` is "inception", its weights file, or a timm network's file (described by `network`
    if it does not do so itself). `reference` is "train" or "val" (default: train for samples, val
    for reconstructions), or a path. The same `seed` gives the same noise each time, so that curves
    are smooth; report final numbers on other seeds.
    """

    def __init__(
        self,
        extractor: str = "inception",
        network: NetworkFacts | None = None,
        num_samples: int = 10_000,
        every_n_epochs: int | None = 1,
        every_n_updates: int | None = None,
        metrics: Sequence[Metric] = ("fd",),
        reference: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        precision: Literal["float32", "bf16"] = "float32",
        seed: int = 0,
        batch_size: int = 64,
        cache: str = "runs/.cache",
    ) -> None:
        if (every_n_epochs is None) == (every_n_updates is None):
            raise ValueError(
                "give either every_n_epochs or every_n_updates, and null for the other"
            )
        self.extractor_source = extractor
        self.network = network
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.every_n_updates = every_n_updates
        self.metrics = tuple(metrics)
        self.reference_name = reference
        self.sampling = sampling
        self.precision = precision
        self.seed = seed
        self.batch_size = batch_size
        self.cache = cache
        self._extractor: Extractor | None = None
        self._reference: Reference | None = None
        self._measured = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Load the network and make the reference before training, so that what is missing is said
        at once.
        """
        extractor = load_extractor(self.extractor_source, self.network).to(pl_module.device)
        self._extractor, self._reference = (
            extractor,
            self._make_reference(trainer, pl_module, extractor),
        )
        check_metrics(
            self.metrics, extractor, self._reference, self._source(trainer, pl_module).has_originals
        )
        self._measured = pl_module.updates

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        due = self.every_n_updates and pl_module.updates % self.every_n_updates == 0
        if due and pl_module.updates != self._measured:
            self.measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.measure(trainer, pl_module)

    def measure(self, trainer: L.Trainer, pl_module: Any) -> Record:
        """Measure now, with averaged weights where they are kept; all ranks take part and get the
        same record.
        """
        assert self._extractor is not None
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        with ema.swapped(pl_module) if ema else nullcontext(), gathered(pl_module):
            source = self._source(trainer, pl_module)
            record = evaluate_samples(
                source,
                self._extractor,
                self._reference,
                metrics=self.metrics,
                batch_size=self.batch_size,
            )
        self._measured = pl_module.updates
        record["samples"] |= {"weights": "ema" if ema else "raw", "updates": pl_module.updates}
        self._log(trainer, pl_module, record)
        return record

    def _log(self, trainer: L.Trainer, pl_module: Any, record: Record) -> None:
        values = {f"val/{name}": value for name, value in record["metrics"].items()}
        values |= {
            MONITOR: next(iter(values.values())),
            "val/evaluation_seconds": record["seconds"],
        }
        # For Checkpoints; loggers would drop it between their steps.
        pl_module.log_dict(values, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.updates)
        if trainer.is_global_zero:
            write_record(
                record,
                Path(trainer.default_root_dir) / "evaluations" / f"{pl_module.updates:08d}.json",
            )

    def _source(self, trainer: L.Trainer, pl_module: Any) -> ImageSource:
        model = getattr(pl_module, "model", None)
        data = trainer.datamodule if isinstance(trainer.datamodule, ImageDataModule) else None  # type: ignore[attr-defined]
        if isinstance(model, ImageGenerator):
            captions = data.val_dataset() if data else None
            names = data.class_names if data else ()
            return GeneratedImages(
                model,
                self.num_samples,
                self.sampling,
                self.seed,
                captions,
                self.precision,
                class_names=names,
            )
        return Reconstructions(pl_module.tokenizer, self._images(trainer, "val", self.num_samples))

    def _make_reference(
        self, trainer: L.Trainer, pl_module: Any, extractor: Extractor
    ) -> Reference:
        generates = isinstance(getattr(pl_module, "model", None), ImageGenerator)
        name = self.reference_name or ("train" if generates else "val")
        if name not in ("train", "val"):
            return load_reference(name, extractor, self.cache, self.batch_size)
        # A tokenizer is compared with the very images that it reconstructs.
        limit = None if generates or name == "train" else self.num_samples
        return reference_from(
            self._images(trainer, name, limit), extractor, self.cache, self.batch_size
        )

    def _images(self, trainer: L.Trainer, split: str, limit: int | None) -> DatasetImages:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageDataModule):
            raise UserError(
                f"the FID callback finds no images in the data {type(data).__name__}; give it a reference file"
            )
        dataset = data.train_dataset(augment=False) if split == "train" else data.val_dataset()
        limit = None if limit is None else min(limit, len(dataset))
        return DatasetImages(dataset, data.name, split, limit)
