"""The one evaluation engine: under `evaluate.py`, the FID callback and the benchmarks.

    record = evaluate_samples(source, extractor, reference, protocol("fmnist-10k"))

With several networks (`evaluate`) each image is made once and seen by all of them, and one record
holds every number. Every rank calls it and gets the same record; each rank extracts features of its
own share of the images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessellar.errors import UserError
from tessellar.evaluation.class_match import ClassMatch, match_classes, other_classes, other_shares
from tessellar.evaluation.collect import Collected, collect_all
from tessellar.evaluation.metrics import (
    applicable,
    check_metrics,
    distance_name,
    measure,
    needs_of,
    ratios,
    versions_of_metrics,
)
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.lpips import load_lpips
from tessellar.evaluation.protocols import PROTOCOLS, Metric, Protocol
from tessellar.evaluation.record import Record, make_record
from tessellar.evaluation.references import Reference
from tessellar.evaluation.sources import ImageSource
from tessellar.measures.frechet import frechet_distance
from tessellar.networks.facts import marks_of


@dataclass(frozen=True)
class Yardstick:
    """A network, and the statistics that its features are compared with.

    `validation` are those of validation images, whose own distance a ratio (`fdr`) divides by.
    """

    extractor: Extractor
    reference: Reference | None = None
    validation: Reference | None = None


def evaluate_samples(
    source: ImageSource,
    extractor: Extractor,
    reference: Reference | None,
    protocol: Protocol = PROTOCOLS["free"],
    metrics: Sequence[Metric] | None = None,
    batch_size: int = 64,
    lpips_weights: str | None = None,
) -> Record:
    """Measure the images of `source` with one network; `metrics` defaults to the protocol's.

    Raises UserError where the protocol is not kept, where a metric lacks what it needs, and where the
    network chose the samples itself.
    """
    yardsticks = [Yardstick(extractor, reference)]
    return evaluate(
        source,
        yardsticks,
        protocol=protocol,
        metrics=metrics,
        batch_size=batch_size,
        lpips_weights=lpips_weights,
    )


def evaluate(
    source: ImageSource,
    yardsticks: Sequence[Yardstick],
    protocol: Protocol = PROTOCOLS["free"],
    metrics: Sequence[Metric] | None = None,
    batch_size: int = 64,
    lpips_weights: str | None = None,
) -> Record:
    """As `evaluate_samples`, with all networks in one pass; a metric that some of several networks
    cannot give (classes, spatial features) is that of the others.
    """
    started = time.perf_counter()
    metrics = tuple(protocol.metrics if metrics is None else metrics)
    for one in yardsticks:
        refuse_selector(source, one.extractor)
    protocol.check_networks([one.extractor.name for one in yardsticks])
    warnings: list[str] = []
    for one in yardsticks:
        warnings += check_one(source, one, protocol)
    chosen = check_metrics_of(yardsticks, metrics, source)
    validation = validation_distances(yardsticks, protocol) if "fdr" in metrics else None
    matches = []
    for one, own in zip(yardsticks, chosen, strict=True):
        match = match_classes(source, one.extractor) if "accuracy" in own else ClassMatch()
        warnings += match.warnings
        matches.append(match)
    lpips = load_lpips(lpips_weights) if "lpips" in metrics else None
    jobs = []
    for one, own, match in zip(yardsticks, chosen, matches, strict=True):
        network = lpips if "lpips" in own else None
        needs = needs_of(own, protocol.is_splits, network, classes=match.ids)
        jobs.append((one.extractor, needs))
    collected = collect_all(source.batches(batch_size), source.count, jobs, batch_size)
    values: dict[str, float] = {}
    facts = {}
    references = {}
    distances = {}
    for one, own, seen in zip(yardsticks, chosen, collected, strict=True):
        measured = measure(seen, one.reference, one.extractor, own)
        values |= with_names_apart(measured, one.extractor, chosen)
        warnings += warnings_of(seen, source, one.extractor, one.reference)
        name = one.extractor.name
        if "fdr" in own:
            paired = seen.paired is not None
            distances[name] = measured[distance_name(one.extractor, seen.count, paired)]
        facts[name] = comparable_facts(source, one.extractor, one.reference, protocol)
        references[name] = one.reference.describe() if one.reference else None
    if "fdr" in metrics:
        values |= ratios(distances, validation, protocol)
    first = yardsticks[0].extractor.name
    record = make_record(
        metrics=values,
        comparable=facts[first] if len(facts) == 1 else {"networks": facts},
        samples={**source.describe(), "hash": collected[0].image_hash},
        reference=references[first],
        warnings=list(dict.fromkeys(warnings)),
        seconds=time.perf_counter() - started,
    )
    if any(other != references[first] for other in references.values()):
        record["references"] = references
    return record


def check_metrics_of(
    yardsticks: Sequence[Yardstick], metrics: Sequence[Metric], source: ImageSource
) -> list[tuple[Metric, ...]]:
    """Which metrics each network measures; raises UserError, before any image is made, where a metric
    lacks what it needs.
    """
    chosen = applicable(metrics, [one.extractor for one in yardsticks])
    for one, own in zip(yardsticks, chosen, strict=True):
        check_metrics(own, one.extractor, one.reference, source.has_originals)
    return chosen


def validation_distances(
    yardsticks: Sequence[Yardstick], protocol: Protocol
) -> dict[str, float] | None:
    """Distance of the validation images from each reference; None where the protocol has its own.

    Raises UserError where there are no validation images.
    """
    if protocol.name == "fdr6":
        return None
    found = {}
    for one in yardsticks:
        if one.validation is None or one.reference is None:
            raise UserError(
                "metric 'fdr' divides by the distance of the validation images from the reference: give both, "
                "--reference train --validation val (or take --protocol fdr6, which has that of ImageNet)"
            )
        one.validation.check(one.extractor)
        found[one.extractor.name] = frechet_distance(one.validation.moments, one.reference.moments)
    return found


def check_one(source: ImageSource, one: Yardstick, protocol: Protocol) -> list[str]:
    """Warnings about what files do not tell; raises UserError where the protocol is not kept with
    this network, or the reference is of another.
    """
    unsure = protocol.check(
        source.count,
        source.label_plan,
        one.extractor.name,
        one.extractor.resize,
        one.reference.split if one.reference else None,
        measured=source.split,
    )
    if one.reference is not None:
        one.reference.check(one.extractor)
    return unsure


def with_names_apart(
    values: dict[str, float], extractor: Extractor, chosen: Sequence[Sequence[Metric]]
) -> dict[str, float]:
    """`accuracy` with its network's name where several networks give one."""
    if sum("accuracy" in own for own in chosen) < 2:
        return values
    apart = {}
    for name, value in values.items():
        apart[f"accuracy({extractor.name})" if name == "accuracy" else name] = value
    return apart


def refuse_selector(source: ImageSource, extractor: Extractor) -> None:
    """Raise UserError where the network chose these images in a search: it would judge its own choice."""
    chose = source.selected_by
    if not chose:
        return
    marks = set(marks_of(extractor))
    for network in chose:
        if network.sha256 == extractor.sha256 or marks & set(network.marks):
            raise UserError(
                f"the samples {source.name} were selected by {network.name}, whose weights {extractor.name} has: "
                "measure them with another network"
            )


def comparable_facts(
    source: ImageSource, extractor: Extractor, reference: Reference | None, protocol: Protocol
) -> dict[str, Any]:
    """What must agree for two numbers of one network to be comparable."""
    return {
        "extractor": extractor.describe(),
        "reference": reference.hash if reference else None,
        "reference_images": reference.moments.count if reference else None,
        "samples": source.count,
        "labels": source.label_plan,
        "protocol": protocol.describe(),
        "metric_versions": versions_of_metrics(),
    }


def warnings_of(
    collected: Collected, source: ImageSource, extractor: Extractor, reference: Reference | None
) -> list[str]:
    found = [*source.warnings]
    if reference is not None:
        found += [
            *reference.warnings,
            *other_classes(source, reference.name, reference.class_names),
            *other_shares(source, reference.class_names, reference.class_counts),
        ]
    if collected.duplicates:
        found.append(
            f"{collected.duplicates} of {collected.count} samples are bit-identical to another one"
        )
    if collected.count <= extractor.dim:
        found.append(
            f"{collected.count} samples are no more than the {extractor.dim} features: the distance is biased upwards"
        )
    return found
