"""FID: Fréchet distances (or any metrics of the engine) while training, also for best.ckpt.

A generator is measured by class-balanced samples against the data set, a tokenizer by
reconstructions of validation images (rFD). The name logged is the network's: `val/FID-10k`,
`val/FD(fmnist-resnet10t)`; `val/distance` is the first network's under a name that fits into file
names. Several networks see the same samples, several guidance scales share the references, raw
weights may be measured beside the averaged ones, and several sets of seeds tell the noise. Each
measurement leaves its records in the run's folder: a run that is resumed takes them from there.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal

import lightning as L

from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.weights import digest_of
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import digest
from tessellar.distributed import broadcast
from tessellar.errors import UserError
from tessellar.evaluation.engine import Yardstick, check_metrics_of, evaluate
from tessellar.evaluation.generation import GeneratedImages, Reconstructions
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractors
from tessellar.evaluation.protocols import HELD_OUT, Metric
from tessellar.evaluation.record import Record, read_record, write_record
from tessellar.evaluation.references import Reference, load_references, references_from
from tessellar.evaluation.sources import DatasetImages, ImageSource
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import AMOUNTS, SIZES, in_ranges
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.settings import Sampling
from tessellar.training.sharding import gathered, whole

log = logging.getLogger(__name__)
MONITOR = "val/distance"
Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Setting:
    """One of the things measured at an update; `label` is what its numbers carry."""

    weights: Weights
    sampling: Sampling
    seed: int
    label: str


@in_ranges
class FID(L.Callback):
    """Measure every `every_n_epochs` epochs, or every `every_n_updates` updates.

    `extractor` names one network or several, as `evaluate.py --extractor` does (`network` describes
    the file of a single one). `reference` is "train" or "val" (default: train for samples, val for
    reconstructions), or a path. `guidance` are scales to measure at (default: that of `sampling`),
    of which `val/distance` is the best; `weights` are the averaged ones where they are kept, the raw
    ones, or both. The same `seed` gives the same noise each time, so that curves are smooth; `sets`
    of seeds are averaged, and `... noise` is their deviation. Report final numbers on other seeds.

    All of it takes at most `share` of the run's time, or `free_seconds` where that is more: what
    would exceed it is left out, and the log says so. After `patience` measurements without a better
    `val/distance` the run ends.
    """

    ranges: ClassVar = {"patience": SIZES, "free_seconds": AMOUNTS}

    def __init__(
        self,
        extractor: str | Sequence[str] = "inception",
        network: NetworkFacts | None = None,
        num_samples: int = 10_000,
        every_n_epochs: int | None = 1,
        every_n_updates: int | None = None,
        metrics: Sequence[Metric] = ("fd",),
        reference: str | Sequence[str] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        precision: Literal["float32", "bf16"] = "float32",
        seed: int = 0,
        batch_size: int = 64,
        cache: str = "runs/.cache",
        guidance: Sequence[float] = (),
        weights: Literal["ema", "raw", "both"] = "ema",
        sets: int = 1,
        share: float = 0.05,
        free_seconds: float = 60.0,
        patience: int | None = None,
    ) -> None:
        if (every_n_epochs is None) == (every_n_updates is None):
            raise ValueError(
                "give either every_n_epochs or every_n_updates, and null for the other"
            )
        self.extractor_sources = [extractor] if isinstance(extractor, str) else list(extractor)
        self.network = network
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.every_n_updates = every_n_updates
        self.metrics = tuple(metrics)
        self.reference_names = [reference] if isinstance(reference, str) else list(reference or ())
        self.sampling = sampling
        self.precision = precision
        self.seed = seed
        self.batch_size = batch_size
        self.cache = cache
        self.guidance = tuple(guidance)
        self.weights = weights
        self.sets = sets
        self.share = share
        self.free_seconds = free_seconds
        self.patience = patience
        self._yardsticks: list[Yardstick] = []
        self._measured = 0
        self._left_out = 0
        # Over resumes: seconds of measuring, of the last measurement, of the whole run.
        self._spent = 0.0
        self._last = 0.0
        self._before = 0.0
        self._started = 0.0
        self._best: float | None = None
        self._without_better = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "spent": self._spent,
            "last": self._last,
            "run": self._run_seconds(),
            "best": self._best,
            "without_better": self._without_better,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spent = state_dict["spent"]
        self._last = state_dict["last"]
        self._before = state_dict["run"]
        self._best = state_dict["best"]
        self._without_better = state_dict["without_better"]

    def _run_seconds(self) -> float:
        here = time.perf_counter() - self._started if self._started else 0.0
        return self._before + here

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Load the networks and make the references before training, so that what is missing is
        said at once.
        """
        extractors = [
            extractor.to(pl_module.device)
            for extractor in load_extractors(self.extractor_sources, self.network)
        ]
        references = self._make_references(trainer, pl_module, extractors)
        pairs = zip(extractors, references, strict=True)
        self._yardsticks = [Yardstick(*pair) for pair in pairs]
        source = self._source(trainer, pl_module)
        check_metrics_of(self._yardsticks, self.metrics, source)
        if self.guidance and not isinstance(source, GeneratedImages):
            raise UserError("the FID callback: guidance is of generators; a tokenizer has none")
        self._measured = pl_module.updates
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        due = self.every_n_updates and pl_module.updates % self.every_n_updates == 0
        if due and pl_module.updates != self._measured:
            self._measure_within_budget(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure_within_budget(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what share of the run the measurements took."""
        total = self._run_seconds()
        if trainer.is_global_zero and self._spent and total:
            left_out = f"; {self._left_out} were left out" if self._left_out else ""
            log.info(
                "measuring took %.1f s, %.1f %% of the run's time (at most %.1f %%)%s",
                self._spent,
                100 * self._spent / total,
                100 * self.share,
                left_out,
            )

    def _measure_within_budget(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure, unless that would take more than its share of the run's time."""
        allowed = max(self.free_seconds, self.share * (self._run_seconds() + self._last))
        fits = broadcast(self._spent + self._last <= allowed)  # processes have clocks of their own
        self._measured = pl_module.updates
        if fits:
            self.measure(trainer, pl_module)
            return
        self._left_out += 1
        if trainer.is_global_zero and self._left_out == 1:
            log.warning(
                "a measurement of about %.0f s is left out: all of them took %.0f s, which with it would be more than "
                "%.1f %% of the run's time (share, every_n_updates and num_samples change that)",
                self._last,
                self._spent,
                100 * self.share,
            )

    def measure(self, trainer: L.Trainer, pl_module: Any) -> Record:
        """Measure now, with averaged weights where they are kept; all ranks take part and get the
        same record, that of the first setting.
        """
        assert self._yardsticks
        started = time.perf_counter()
        records: dict[Setting, Record] = {}
        for kind in self._kinds(trainer):
            with self._with_weights(trainer, pl_module, kind):
                # Before parameters are gathered: a sharded module's state scatters them again.
                weights = digest_of(_tensors(pl_module))
                with gathered(pl_module):
                    for setting in self._settings(kind):
                        source = self._source(trainer, pl_module, setting)
                        record = self._record(trainer, pl_module, setting, source, weights)
                        records[setting] = record
        self._measured = pl_module.updates
        self._last = time.perf_counter() - started
        self._spent += self._last
        self._log(trainer, pl_module, records)
        return next(iter(records.values()))

    def _kinds(self, trainer: L.Trainer) -> tuple[Weights, ...]:
        kept = any(isinstance(c, EMA) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if not kept or self.weights == "raw":
            return ("raw",)
        return ("ema", "raw") if self.weights == "both" else ("ema",)

    @contextmanager
    def _with_weights(self, trainer: L.Trainer, pl_module: Any, kind: Weights) -> Iterator[None]:
        """The averaged weights where `kind` says so."""
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        with ema.swapped(pl_module) if ema and kind == "ema" else nullcontext():
            yield

    def _settings(self, kind: Weights) -> list[Setting]:
        """What is measured with one kind of weights: each guidance scale, each set of seeds."""
        found = []
        for scale in self.guidance or (None,):
            words = []
            sampling = self.sampling
            if scale is not None:
                sampling = replace(sampling, guidance=replace(sampling.guidance, scale=scale))
            if len(self.guidance) > 1:
                words.append(f"guidance {scale:g}")
            if self.weights == "both" and kind == "raw":
                words.append("raw")
            for number in range(self.sets):
                seed = self.seed + number * self.num_samples
                found.append(Setting(kind, sampling, seed, " ".join(words)))
        return found

    def _record(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        setting: Setting,
        source: ImageSource,
        weights: str,
    ) -> Record:
        """The record of one setting; that of an earlier run of the same weights, where there is one."""
        place = Path(trainer.default_root_dir) / "evaluations"
        parts = [f"{pl_module.updates:08d}", *setting.label.split()]
        if setting.seed != self.seed:
            parts.append(f"seed{setting.seed}")
        path = place / f"{'-'.join(parts)}.json"
        key = digest(
            weights=weights,
            samples=source.describe(),
            networks=[one.extractor.describe() for one in self._yardsticks],
            references=[one.reference.hash for one in self._yardsticks if one.reference],
            metrics=self.metrics,
        )
        known = None
        if trainer.is_global_zero and path.is_file():
            found = read_record(path)
            known = found if found.get("key") == key else None
        known = broadcast(known)
        if known is not None:
            return known
        record = evaluate(
            source, self._yardsticks, metrics=self.metrics, batch_size=self.batch_size
        )
        record["samples"] |= {"weights": setting.weights, "updates": pl_module.updates}
        record["key"] = key
        if trainer.is_global_zero:
            write_record(record, path)
        return record

    def _log(self, trainer: L.Trainer, pl_module: Any, records: dict[Setting, Record]) -> None:
        values: dict[str, float] = {}
        groups: dict[str, list[Record]] = {}
        for setting, record in records.items():
            groups.setdefault(setting.label, []).append(record)
        for label, sets in groups.items():
            for name in sets[0]["metrics"]:
                found = [record["metrics"][name] for record in sets]
                key = " ".join(filter(None, ("val/" + name, label)))
                values[key] = fmean(found)
                if len(found) > 1:
                    values[f"{key} noise"] = stdev(found)
        first = next(iter(next(iter(records.values()))["metrics"]))
        # Raw weights are measured beside the averaged ones, not instead of them.
        candidates = {
            label: fmean(record["metrics"][first] for record in sets)
            for label, sets in groups.items()
            if "raw" not in label
        }
        distance = min(candidates.values())
        values[MONITOR] = distance
        values["val/evaluation_seconds"] = self._last
        total = self._run_seconds()
        values["val/evaluation_share"] = self._spent / total if total else 0.0
        # For Checkpoints; loggers would drop it between their steps.
        pl_module.log_dict(values, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.updates)
        self._stop_early(trainer, distance)

    def _stop_early(self, trainer: L.Trainer, distance: float) -> None:
        """End the run after `patience` measurements without a better distance."""
        if self._best is None or distance < self._best:
            self._best = distance
            self._without_better = 0
            return
        self._without_better += 1
        if self.patience is not None and self._without_better >= self.patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info(
                    "the run ends: %d measurements without a better distance than %.5g",
                    self._without_better,
                    self._best,
                )

    def _source(
        self, trainer: L.Trainer, pl_module: Any, setting: Setting | None = None
    ) -> ImageSource:
        model = getattr(pl_module, "model", None)
        data = trainer.datamodule if isinstance(trainer.datamodule, ImageDataModule) else None  # type: ignore[attr-defined]
        if isinstance(model, ImageGenerator):
            # A run on cached tokens may have no images, but it has the captions it is taught by.
            reads_text = not isinstance(model.conditioner, ClassConditioner)
            captions = data.text_datasets()[1] if data and reads_text else None
            names = data.class_names if data else ()
            return GeneratedImages(
                model,
                self.num_samples,
                sampling=setting.sampling if setting else self.sampling,
                seed=setting.seed if setting else self.seed,
                data=captions,
                precision=self.precision,
                class_names=names,
            )
        return Reconstructions(pl_module.tokenizer, self._images(trainer, "val", self.num_samples))

    def _make_references(
        self, trainer: L.Trainer, pl_module: Any, extractors: Sequence[Extractor]
    ) -> list[Reference]:
        generates = isinstance(getattr(pl_module, "model", None), ImageGenerator)
        names = self.reference_names or ["train" if generates else "val"]
        if names[0] not in ("train", "val"):
            return load_references(names, extractors, self.cache, self.batch_size)
        # A tokenizer is compared with the very images that it reconstructs.
        limit = None if generates or names[0] == "train" else self.num_samples
        images = self._images(trainer, names[0], limit)
        return references_from(images, extractors, self.cache, self.batch_size)

    def _images(self, trainer: L.Trainer, split: str, limit: int | None) -> DatasetImages:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageDataModule):
            raise UserError(
                f"the FID callback finds no images in the data {type(data).__name__}; give it a reference file"
            )
        dataset = data.train_dataset(augment=False) if split == "train" else data.val_dataset()
        limit = None if limit is None else min(limit, len(dataset))
        told = HELD_OUT if split == "val" and data.holds_out else split
        return DatasetImages(dataset, data.name, told, limit)


def _tensors(pl_module: Any) -> dict[str, Any]:
    """The weights that are trained, whole on every process."""
    state = pl_module.ema_target.state_dict()
    return {name: whole(tensor).detach().cpu() for name, tensor in state.items()}
