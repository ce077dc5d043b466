"""`evaluate.py tokens|probe`: what reconstructions do not tell of a tokenizer."""

import logging
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import torch

from tessellar import distributed
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.evaluation_run import (
    CACHE,
    Measurement,
    check_count,
    check_out,
    data_of_run,
    new_file,
    split_of,
    warn,
)
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation import protocols
from tessellar.evaluation.engine import evaluate
from tessellar.evaluation.metrics import distance_name
from tessellar.evaluation.probing import (
    PROBES,
    Features,
    Probe,
    ProbeProtocol,
    accuracies,
    features_of,
    purities,
    retrieval,
)
from tessellar.evaluation.protocols import Metric
from tessellar.evaluation.record import Record, make_record, summary, write_record
from tessellar.evaluation.references import Reference
from tessellar.evaluation.sources import DatasetImages, ImageSource
from tessellar.evaluation.token_metrics import (
    ChangedReconstructions,
    check_swaps,
    prefix_curve,
    prefix_lengths,
    swap_distances,
    unchanged,
)
from tessellar.evaluation.token_views import Asked, asked, view
from tessellar.measures.codes import code_use
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator, assemble
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_whole
from tessellar.protocol.tokenizer import Tokenizer

log = logging.getLogger(__name__)
CODES_OF_IMAGES = " tokens"  # what tokens are kept under, beside the features; no name of one
PROBE_VERSION = 1  # raised when a probe gives another number for the same features


def tokens(
    model: str,
    data: ImageDataModule | None = None,
    extractor: list[str] | None = None,
    network: NetworkFacts | None = None,
    count: int | None = None,
    prefix_count: int | None = None,
    lengths: list[int] | None = None,
    alpha: list[float] | None = None,
    delta: list[int] | None = None,
    seed: int = 0,
    raw: bool = False,
    package: str = "",
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a tokenizer's tokens: reconstructions, how evenly codes are used and where, what a
    prefix is worth, and with --alpha and --delta how much codes may err (pFD).

    Args:
        model: export folder, .safetensors, .ckpt or hub id of a tokenizer, or of a generator that holds one
        data: data set whose validation images are encoded, as in a training YAML (default: that of the run)
        extractor: inception (downloaded), its weights file, a timm network's .safetensors; several; or none
        network: what the .safetensors holds, where it does not say so itself
        count: so many validation images, a fixed random part (default: all)
        prefix_count: so many of them for prefixes and swaps (default: as many as count)
        lengths: of the prefixes (default: the shortest, its doublings and all; whole segments of several)
        alpha: shares of the tokens that are swapped for pFD
        delta: numbers of nearest codes that a swap draws from
        seed: swaps of image i are drawn with seed + i
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    trust(package)
    check_out(out)
    check_count("--count", count)
    check_count("--prefix_count", prefix_count)
    check_whole("--seed", seed, least=0, most=2**31)
    measurement = Measurement(
        protocols.protocol("free"), extractor or [], network, device, cache, batch_size
    )
    measurement.begin(model, out)
    data = data or data_of_run(model)
    loaded = tokenizer_of(model, raw)
    tokenizer = loaded.tokenizer.to(measurement.on)
    check_swaps(tokenizer, alpha or [], delta or [])
    steps = prefix_lengths(tokenizer.layout, lengths or [])
    originals = split_of("val", data, count)
    few = split_of("val", data, prefix_count or count)
    of_all = measurement.yardsticks(_references(measurement, originals))
    of_few = measurement.yardsticks(_references(measurement, few))

    source = ChangedReconstructions(tokenizer, originals, unchanged)
    source.facts = loaded.facts
    metrics: list[Metric] = ["fd", "paired"] if measurement.sees else ["paired"]
    record = evaluate(source, of_all, metrics=metrics, batch_size=batch_size)
    found: dict[str, Any] = {"layout": str(tokenizer.layout)}
    if not tokenizer.layout.is_continuous:
        own = torch.cat(source.tokens)
        use = code_use(distributed.gather_rows(own), tokenizer.layout)
        for book, share in use.usage.items():
            label = "" if len(use.usage) == 1 else f" {book}"
            record["metrics"][f"usage{label}"] = share
            record["metrics"][f"evenness{label}"] = use.evenness[book]
        found |= {
            "usage by position": use.usage_by_position,
            "bits by position": use.bits_by_position,
        }
    if len(steps) > 1:
        found["prefixes"] = prefix_curve(
            tokenizer, few, steps, yardsticks=of_few, batch_size=batch_size
        )
    if alpha and delta:
        cells = swap_distances(
            tokenizer,
            few,
            alphas=alpha,
            deltas=delta,
            seed=seed,
            yardsticks=of_few,
            batch_size=batch_size,
        )
        found["swaps"] = cells
        for network_of in measurement.extractors if measurement.sees else ():
            name = distance_name(network_of, few.count, reconstructions=True)
            record["metrics"][f"p{name[1:]}"] = mean(cell[name] for cell in cells)
    record["tokens"] = {**found, "images of prefixes and swaps": few.count}
    _finish(record, out)


def probe(
    model: str,
    data: ImageDataModule | None = None,
    features: list[str] | None = None,
    probes: list[Probe] | None = None,
    protocol: ProbeProtocol = ProbeProtocol(),  # noqa: B008
    train_count: int | None = None,
    count: int | None = None,
    raw: bool = False,
    package: str = "",
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Measure what a tokenizer's features tell of classes and captions: probes are fitted to the
    training images and scored on the validation images.

    Args:
        model: export folder, .safetensors, .ckpt or hub id of a tokenizer, or of a generator that holds one
        data: data set with classes or captions, as in a training YAML (default: that of the run)
        features: of latents tokens codes semantics pixels, or names of the tokenizer's modules; NAME:8 is the first 8
            positions (default: latents tokens)
        probes: of linear softmax attentive knn purity retrieval (default: linear, knn and purity with classes, and
            retrieval with captions)
        protocol: how features are pooled, how probes are fitted, seeds
        train_count: so many training images, a fixed random part (default: all)
        count: so many validation images, a fixed random part (default: all)
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once; it does not change the numbers
        device: auto, cpu, cuda, ...
    """
    started = time.perf_counter()
    trust(package)
    check_out(out)
    check_count("--train_count", train_count)
    check_count("--count", count)
    check_count("--batch_size", batch_size)
    if distributed.world_size() > 1:
        raise UserError("a probe is fitted by one process: start it without torchrun")
    data = data or data_of_run(model)
    train = split_of("train", data, train_count)
    test = split_of("val", data, count)
    chosen = probes or default_probes(train)
    if "retrieval" in chosen and not train.dataset.has_captions:
        raise UserError("retrieval needs captions, and the data set given has none")
    loaded = tokenizer_of(model, raw)
    tokenizer = loaded.tokenizer.to(pick_device(device)).eval()
    check_size(tokenizer, data)
    names = list(dict.fromkeys(features or ["latents", "tokens"]))
    wanted = [asked(name) for name in names]
    looks = {one.base: view(tokenizer, one.base) for one in wanted}
    where = next(tokenizer.parameters()).device
    for one in wanted:
        # What a feature lacks is told before the work, by one blank image.
        with torch.no_grad():
            blank = looks[one.base](torch.zeros(1, 3, *tokenizer.image_size, device=where))
        one.cut(blank)
    if "purity" in chosen and not tokenizer.layout.is_continuous:
        looks[CODES_OF_IMAGES] = tokenizer.encode
    log.info("probes %s of %s; writes %s", ", ".join(names), model, out or "a record")
    known = features_of(train, looks, where, batch_size)
    held_out = features_of(test, looks, where, batch_size)
    metrics: dict[str, float] = {}
    for probe_name in chosen:
        if probe_name == "purity":
            metrics |= purity_metrics(tokenizer, held_out, protocol)
            continue
        for one in wanted:
            sides = (part_of(known, one), part_of(held_out, one))
            metrics |= probe_metrics(probe_name, one.name, sides, (train, test), protocol)
    comparable = {
        "probes": PROBE_VERSION,
        "train": train.fingerprint(),
        "validation": test.fingerprint(),
        "protocol": vars(protocol),
    }
    record = make_record(
        metrics=metrics,
        comparable=comparable,
        samples={**test.describe(), "training images": train.count, **loaded.facts},
        reference=None,
        warnings=[*train.warnings, *test.warnings],
        seconds=time.perf_counter() - started,
    )
    _finish(record, out)


def _references(measurement: Measurement, images: ImageSource) -> list[Reference] | None:
    """The images that are reconstructed are what reconstructions are compared with."""
    return measurement.references_of(images) if measurement.sees else None


class Loaded(NamedTuple):
    """A tokenizer, and where it came from for records."""

    tokenizer: Tokenizer
    facts: dict[str, Any]


def tokenizer_of(model: str, raw: bool) -> Loaded:
    """The tokenizer of an export or checkpoint, or of the generator there."""
    made = read_source(model, raw=raw)
    whole = assemble(made)
    tokenizer = whole.tokenizer if isinstance(whole, ImageGenerator) else whole
    assert isinstance(tokenizer, Tokenizer)
    facts = {"model": model, "weights": made.weights, "fingerprint": fingerprint(tokenizer)}
    return Loaded(tokenizer.eval(), facts)


def check_size(tokenizer: Tokenizer, data: ImageDataModule | None) -> None:
    """Raise UserError where the images of `data` are not of the tokenizer's size."""
    assert data is not None
    given = tuple(data.val_dataset().batch([0])["image"].shape[-2:])
    if given != tuple(tokenizer.image_size):
        raise UserError(
            f"images of {data.name} are {given}, the tokenizer reads {tokenizer.image_size}: probe "
            "images of that size (--data.size)"
        )


def default_probes(images: DatasetImages) -> list[Probe]:
    """What the data set allows: classes, captions, or both."""
    labels = images.dataset.labels
    has_classes = len(labels) > 0 and int(labels.min()) >= 0 and len(labels.unique()) > 1
    chosen: list[Probe] = ["linear", "knn", "purity"] if has_classes else []
    if images.dataset.has_captions and images.dataset.own_captions:
        chosen.append("retrieval")
    if not chosen:
        raise UserError(
            f"{images.name} has neither classes nor captions, which a probe could find; there are "
            f"the probes {', '.join(PROBES)}"
        )
    return chosen


def purity_metrics(
    tokenizer: Tokenizer, held_out: dict[str, Features], protocol: ProbeProtocol
) -> dict[str, float]:
    """Purity and information of the codes of the validation images; UserError where there are
    none.
    """
    if tokenizer.layout.is_continuous:
        raise UserError("continuous tokens have no codes whose purity could be measured")
    features = held_out[CODES_OF_IMAGES]
    if features.labels is None:
        raise UserError("purity needs classes, and the data set given has none")
    found = purities(features.vectors, features.labels, tokenizer.layout, protocol.seed)
    return {
        "purity": found.whole.share,
        "purity, shuffled": found.shuffled.share,
        "purity by position": found.by_position.share,
        "purity by position, shuffled": found.shuffled_by_position.share,
        "information": found.whole.information,
        "information, shuffled": found.shuffled.information,
        "information by position": found.by_position.information,
        "information by position, shuffled": found.shuffled_by_position.information,
    }


def part_of(features: dict[str, Features], wanted: Asked) -> Features:
    """The positions that a name asks for."""
    whole = features[wanted.base]
    return whole._replace(vectors=wanted.cut(whole.vectors))


def probe_metrics(
    chosen: Probe,
    name: str,
    sides: tuple[Features, Features],
    sources: tuple[DatasetImages, DatasetImages],
    protocol: ProbeProtocol,
) -> dict[str, float]:
    """Numbers of one probe of a feature; `sides` and `sources` are of training, then validation."""
    known, held_out = sides
    if chosen == "retrieval":
        captions = [images.captions() for images in sources]
        found = retrieval(
            known.pooled(protocol.pooling),
            captions[0],
            test=held_out.pooled(protocol.pooling),
            test_captions=captions[1],
            penalties=protocol.penalties,
        )
        metrics = {}
        for place, depth in enumerate((1, 5, 10)):
            metrics[f"texts at {depth}({name})"] = found.texts[place]
            metrics[f"images at {depth}({name})"] = found.images[place]
        return metrics
    scores = accuracies(chosen, known, held_out, protocol)
    metrics = {f"{chosen}({name})": mean(scores)}
    if len(scores) > 1:
        metrics[f"{chosen}({name}) std"] = pstdev(scores)
    return metrics


def _finish(record: Record, out: str) -> None:
    """Write the record, print its line."""
    if distributed.rank() == 0:
        path = Path(out) if out else new_file(record)
        write_record(record, path)
        warn(record["warnings"])
        print(f"{summary(record)}\nfingerprint {record['fingerprint']}, record: {path}")
