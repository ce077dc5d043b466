"""What the commands of `evaluate.py` share: a protocol with its network, references, reports, sets
by name.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from tessellar import distributed
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.protocols import HELD_OUT, Metric, Protocol
from tessellar.evaluation.record import Record, summary, write_record
from tessellar.evaluation.references import Reference, load_reference, reference_from
from tessellar.evaluation.sources import DatasetImages, ImageSource
from tessellar.networks.facts import NetworkFacts
from tessellar.places import in_runs

CACHE = "runs/.cache"
SPLITS = ("train", "val")


@dataclass
class Measurement:
    """What the commands share: a protocol and the network that it measures with."""

    protocol: Protocol
    extractor_source: str
    network: NetworkFacts | None
    device: str
    cache: str | None
    batch_size: int

    def __post_init__(self) -> None:
        loaded = load_extractor(self.extractor_source, self.network, self.protocol.resize)
        self.extractor: Extractor = loaded.to(pick_device(self.device))

    def reference(
        self, name: str, data: ImageDataModule | None, size: int | None = None
    ) -> Reference | None:
        """Statistics of a path, whose images are cropped to `size`, or of a split of `data`; None
        without a name.
        """
        if name in SPLITS:
            return self.reference_of(split_of(name, data))
        if not name:
            return None
        return load_reference(name, self.extractor, self.cache, self.batch_size, size)

    def reference_of(self, source: ImageSource) -> Reference:
        return reference_from(source, self.extractor, self.cache, self.batch_size)

    def report(
        self,
        source: ImageSource,
        reference: Reference | None,
        metrics: Sequence[Metric] | None,
        out: str,
        lpips_weights: str | None = None,
    ) -> None:
        """Measure, write the record, print its line."""
        record = evaluate_samples(
            source,
            self.extractor,
            reference=reference,
            protocol=self.protocol,
            metrics=metrics,
            batch_size=self.batch_size,
            lpips_weights=lpips_weights,
        )
        if distributed.rank() == 0:
            path = Path(out) if out else new_file(record)
            write_record(record, path)
            warn(record["warnings"])
            print(f"{summary(record)}\nfingerprint {record['fingerprint']}, record: {path}")


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def new_file(record: Record) -> Path:
    """Where the record of an evaluation lies by default: by the name of what is measured, and now."""
    name = "".join(c if c.isalnum() else "-" for c in record["samples"]["name"])
    return Path("outputs/evaluations") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def split_of(name: str, data: ImageDataModule | None, limit: int | None = None) -> DatasetImages:
    if data is None:
        raise UserError(
            f"{name!r} is a split of a data set; name that too, for example --data tessellar.data.ShapesData"
        )
    if name == "train":
        return DatasetImages(
            data.train_dataset(augment=False), data.name, name, limit, data.num_workers
        )
    split = HELD_OUT if data.holds_out else name
    return DatasetImages(data.val_dataset(), data.name, split, limit, data.num_workers)


def data_of_run(path: str) -> ImageDataModule | None:
    """The data set in the config of the run that `path` lies in; None outside of runs."""
    for folder in [in_runs(path), *in_runs(path).parents][:3]:
        config = (
            yaml.safe_load((folder / "config.yaml").read_text())
            if (folder / "config.yaml").is_file()
            else None
        )
        if isinstance(config, dict) and isinstance(config.get("data"), dict):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(ImageDataModule, "data")
            # jsonargparse 4.49 renamed the method.
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            return instantiate(parser.parse_object({"data": config["data"]}))["data"]
    return None
