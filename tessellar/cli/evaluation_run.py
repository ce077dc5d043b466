"""What the commands of `evaluate.py` share: a protocol with its network, references, reports, sets
by name.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from tessellar import distributed
from tessellar.checkpoints.export import CONFIG, WEIGHTS
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError, check_is_file
from tessellar.evaluation.engine import Yardstick, evaluate
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractors
from tessellar.evaluation.protocols import HELD_OUT, Metric, Protocol
from tessellar.evaluation.record import Record, summary, write_record
from tessellar.evaluation.references import Reference, load_references, references_from
from tessellar.evaluation.sources import DatasetImages, ImageSource
from tessellar.networks.facts import NetworkFacts
from tessellar.places import in_runs
from tessellar.plain_data import read_yaml
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.run import MAX_IMAGES

log = logging.getLogger(__name__)
CACHE = "runs/.cache"
RECORDS = Path("outputs/evaluations")
SPLITS = ("train", "val")


@dataclass
class Measurement:
    """What the commands share: a protocol and the networks that it measures with."""

    protocol: Protocol
    extractor_sources: Sequence[str]
    network: NetworkFacts | None
    device: str
    cache: str | None
    batch_size: int
    validation: Sequence[Reference] | None = None

    def __post_init__(self) -> None:
        check_whole("--batch_size", self.batch_size, least=1, most=MAX_IMAGES)
        self.on = pick_device(self.device)
        sources = self.extractor_sources or self.protocol.networks or ["inception"]
        self.extractors: list[Extractor] = []
        for loaded in load_extractors(sources, self.network, self.protocol.resize):
            self.extractors.append(loaded.to(self.on))

    @property
    def sees(self) -> bool:
        """Whether there is a feature network at all."""
        return bool(self.extractors[0].dim)

    def begin(self, what: str, out: str) -> None:
        """Say what is measured with which network, and where the record will lie."""
        if distributed.rank() == 0:
            place = out or f"a record into {RECORDS}"
            networks = ", ".join(extractor.name for extractor in self.extractors)
            log.info(
                "measures %s with %s; writes %s",
                what,
                networks if self.sees else "no network",
                place,
            )

    def references(
        self, names: Sequence[str] | None, data: ImageDataModule | None, size: int | None = None
    ) -> list[Reference] | None:
        """For each network statistics of a path, whose images are cropped to `size`, or of a split of
        `data`; None without a name.
        """
        if not names:
            return None
        if len(names) == 1 and names[0] in SPLITS:
            return self.references_of(split_of(names[0], data))
        return load_references(names, self.extractors, self.cache, self.batch_size, size=size)

    def references_of(self, source: ImageSource) -> list[Reference]:
        return references_from(source, self.extractors, self.cache, self.batch_size)

    def yardsticks(self, references: Sequence[Reference] | None) -> list[Yardstick]:
        none: list[None] = [None] * len(self.extractors)
        sides = (references or none, self.validation or none)
        return [Yardstick(*row) for row in zip(self.extractors, *sides, strict=True)]

    def report(
        self,
        source: ImageSource,
        references: Sequence[Reference] | None,
        metrics: Sequence[Metric] | None,
        out: str,
        lpips_weights: str | None = None,
    ) -> None:
        """Measure, write the record, print its line."""
        record = evaluate(
            source,
            self.yardsticks(references),
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


def check_out(out: str) -> None:
    """Before the work, not after it: raise UserError where a file cannot be written to `out`."""
    path = Path(out)
    if out and path.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    check_is_file(path)
    taken = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if taken is not None:
        raise UserError(f"--out {out}: {taken} is a file, not a folder")


def check_count(name: str, count: int | None) -> None:
    """Raise UserError for a number of images that cannot be."""
    if count is not None:
        check_whole(name, count, least=1, most=MAX_IMAGES)


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def new_file(record: Record) -> Path:
    """Where the record of an evaluation lies by default: by the name of what is measured, and now."""
    name = "".join(c if c.isalnum() else "-" for c in record["samples"]["name"])
    return RECORDS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


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
        if (folder / WEIGHTS).exists() or not (folder / CONFIG).is_file():
            continue  # the config of an export, which others may have made, names no data
        config = read_yaml(folder / CONFIG)
        if isinstance(config, dict) and isinstance(config.get("data"), dict):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(ImageDataModule, "data")
            # jsonargparse 4.49 renamed the method.
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            return instantiate(parser.parse_object({"data": config["data"]}))["data"]
    return None
