"""`evaluate.py`: measure samples, models and tokenizers; make references and feature networks; compare records.

A set of images is named by the path of a folder or an npz, or by `train` or `val`, which are those of --data.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from tessellar import distributed
from tessellar.cli.functions import run_functions
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.image_folder import ImageFolder
from tessellar.errors import UserError
from tessellar.evaluation import protocols
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.extractors import Extractor, load_extractor
from tessellar.evaluation.generation import GeneratedImages, Reconstructions
from tessellar.evaluation.network_facts import NetworkFacts
from tessellar.evaluation.protocols import Metric, Protocol
from tessellar.evaluation.record import Record, differences, read_record, summary, write_record
from tessellar.evaluation.record import compare as comparison
from tessellar.evaluation.references import Reference, load_reference, reference_from, save_statistics
from tessellar.evaluation.sources import DatasetImages, ImageSource, open_images
from tessellar.interop.load import assemble, read_source
from tessellar.interop.weights import fingerprint
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.choice import Choice
from tessellar.sampling.guidance import GuidanceSettings
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.base import Tokenizer

CACHE = "runs/.cache"
SPLITS = ("train", "val")


def samples(
    samples: str,
    reference: str = "",
    data: ImageDataModule | None = None,
    extractor: str = "inception",
    network: NetworkFacts | None = None,
    protocol: str = "free",
    metrics: list[Metric] | None = None,
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a folder of PNG files, or an npz with arr_0.

    Args:
        samples: folder or npz
        reference: folder, npz of images or of statistics; or train or val of --data
        data: data set of the reference, as in a training YAML: a class, then --data.root and so on
        extractor: inception (downloaded), its weights file, or a timm network's .safetensors
        network: what the .safetensors holds, where it does not say so itself
        protocol: adm-50k, torch-fidelity, clean-fid, rfid-val, fmnist-10k or free
        metrics: of fd sfd is kid pr accuracy (default: the protocol's)
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once; it does not change the numbers
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    run = Run(protocols.protocol(protocol), extractor, network, device, cache, batch_size)
    source = open_images(samples)
    run.report(source, run.reference(reference, data), metrics, out)


def model(
    model: str,
    data: ImageDataModule | None = None,
    reference: str = "",
    extractor: str = "inception",
    network: NetworkFacts | None = None,
    protocol: str = "free",
    metrics: list[Metric] | None = None,
    count: int | None = None,
    guidance: GuidanceSettings = GuidanceSettings(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: str = "ancestral",
    seed: int = 0,
    precision: Literal["float32", "bf16"] = "float32",
    raw: bool = False,
    lpips_weights: str | None = None,
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a generator by class-balanced samples, or a tokenizer by its reconstructions, without files between.

    Args:
        model: run, export folder, .safetensors, .ckpt or hub id
        data: data set, as in a training YAML (default: that of the run)
        reference: train or val of --data, or a path (default: train for samples, val for reconstructions)
        extractor: inception (downloaded), its weights file, or a timm network's .safetensors
        network: what the .safetensors holds, where it does not say so itself
        protocol: adm-50k, torch-fidelity, clean-fid, rfid-val, fmnist-10k or free
        metrics: of fd sfd is kid pr accuracy paired lpips (default: the protocol's; paired is PSNR and SSIM)
        count: number of samples, or of validation images to reconstruct (default: the protocol's, or all)
        guidance: classifier-free guidance; scale 1 is none
        choice: how a token is drawn from its probabilities
        algorithm: decoding algorithm
        seed: sample i is drawn with seed + i
        precision: arithmetic of the generator
        raw: weights of the last step instead of the averaged ones
        lpips_weights: torchvision's VGG-16 weights (default: downloaded)
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    run = Run(protocols.protocol(protocol), extractor, network, device, cache, batch_size)
    data = data or data_of_run(model)
    made = read_source(model, raw=raw)
    loaded = assemble(made).to(run.extractor.device)
    facts = {"model": model, "weights": made.weights, "fingerprint": fingerprint(loaded)}
    count = count or run.protocol.samples
    if isinstance(loaded, Tokenizer):
        source: ImageSource = Reconstructions(loaded, _split("val", data, count), facts)
        # The default reference is the very images that were reconstructed.
        against = run.reference(reference, data) if reference else run.reference_of(_split("val", data, count))
        metrics = metrics or (["fd", "paired"] if protocol == "free" else None)
    else:
        source = _generated(loaded, count, Sampling(guidance, choice, algorithm), seed, precision, data, facts)
        against = run.reference(reference or "train", data)
        metrics = metrics or (_free_metrics(loaded, run.extractor) if protocol == "free" else None)
    run.report(source, against, metrics, out, lpips_weights)


def stats(
    images: str,
    data: ImageDataModule | None = None,
    size: int | None = None,
    extractor: str = "inception",
    network: NetworkFacts | None = None,
    protocol: str = "free",
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Reference statistics of any images: mu, sigma (and mu_s, sigma_s for sFID, features for KID, precision, recall).

    Args:
        images: folder or npz with arr_0; or train or val of --data
        data: data set, as in a training YAML: a class, then --data.root and so on
        size: crop the centre of a folder's images to this size, as ADM does
        extractor: inception (downloaded), its weights file, or a timm network's .safetensors
        network: what the .safetensors holds, where it does not say so itself
        protocol: whose resize the Inception network takes
        out: npz to write
        batch_size: images at once; it does not change the numbers
        device: auto, cpu, cuda, ...
    """
    if not out:
        raise UserError("say where to write: --out REF.npz")
    run = Run(protocols.protocol(protocol), extractor, network, device, None, batch_size)
    source = (
        _split(images, data) if images in SPLITS else _cropped(images, size) if size else open_images(images, False)
    )
    reference = reference_from(source, run.extractor, None, batch_size)
    if distributed.rank() == 0:
        save_statistics(reference, out)
        print(f"wrote {out}: {reference.moments.count} images of {reference.name}, hash {reference.hash}")
        _warn(reference.warnings)


def compare(a: str, b: str) -> int:
    """Put two records side by side; exit code 1 where their numbers are not comparable.

    Args:
        a: JSON record
        b: JSON record
    """
    records = read_record(a), read_record(b)
    print(comparison(*records, names=(Path(a).stem[:12], Path(b).stem[:12])))
    return 1 if differences(*records) else 0


@dataclass
class Run:
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

    def reference(self, name: str, data: ImageDataModule | None) -> Reference | None:
        """Statistics of a path, or of a split of `data`; None without a name."""
        if name in SPLITS:
            return self.reference_of(_split(name, data))
        return load_reference(name, self.extractor, self.cache, self.batch_size) if name else None

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
            source, self.extractor, reference, self.protocol, metrics, self.batch_size, lpips_weights
        )
        if distributed.rank() == 0:
            path = Path(out) if out else _new_file(record)
            write_record(record, path)
            _warn(record["warnings"])
            print(f"{summary(record)}\nfingerprint {record['fingerprint']}, record: {path}")


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def _new_file(record: Record) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in record["samples"]["name"])
    return Path("outputs/evaluations") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def _split(name: str, data: ImageDataModule | None, limit: int | None = None) -> DatasetImages:
    if data is None:
        raise UserError(
            f"{name!r} is a split of a data set; name that too, for example --data tessellar.data.ShapesData"
        )
    dataset = data.train_dataset(augment=False) if name == "train" else data.val_dataset()
    return DatasetImages(dataset, data.name, name, limit, data.num_workers)


def _cropped(folder: str, size: int) -> DatasetImages:
    return DatasetImages(ImageFolder(folder, size, "adm"), Path(folder).resolve().name)


def _generated(
    model: ImageGenerator,
    count: int | None,
    sampling: Sampling,
    seed: int,
    precision: str,
    data: ImageDataModule | None,
    facts: dict[str, Any],
) -> GeneratedImages:
    if not count:
        raise UserError("say how many samples: --count N, or a --protocol that fixes it")
    captions = data.val_dataset() if data else None
    return GeneratedImages(model, count, sampling, seed, captions, precision, facts)


def _free_metrics(model: ImageGenerator, extractor: Extractor) -> list[Metric]:
    """The distance, and class accuracy where the network knows as many classes as the generator."""
    same = getattr(model.conditioner, "num_classes", None) == extractor.num_classes
    return ["fd", "accuracy"] if same else ["fd"]


def data_of_run(path: str) -> ImageDataModule | None:
    """The data set in the config of the run that `path` lies in; None outside of runs."""
    for folder in [Path(path), *Path(path).parents][:3]:
        config = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else None
        if isinstance(config, dict) and isinstance(config.get("data"), dict):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(ImageDataModule, "data")
            return parser.instantiate_classes(parser.parse_object({"data": config["data"]}))["data"]
    return None


COMMANDS = {"samples": samples, "model": model, "stats": stats, "compare": compare}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `evaluate.py` and `tessellar evaluate`."""
    with distributed.session():
        return run_functions(COMMANDS, argv, "evaluate")
