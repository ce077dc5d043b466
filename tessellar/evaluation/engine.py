"""The one evaluation engine: under `evaluate.py`, the FID callback and the benchmarks.

    record = evaluate_samples(source, extractor, reference, protocol("fmnist-10k"))

Every rank calls it and gets the same record; each rank extracts features of its own share of the
images.
"""

import time
from collections.abc import Sequence
from typing import Any

from tessellar.evaluation.class_match import ClassMatch, match_classes, other_classes, other_shares
from tessellar.evaluation.collect import Collected, collect
from tessellar.evaluation.metrics import VERSIONS, check_metrics, measure, needs_of
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.protocols import PROTOCOLS, Metric, Protocol
from tessellar.evaluation.record import Record, make_record
from tessellar.evaluation.references import Reference
from tessellar.evaluation.sources import ImageSource


def evaluate_samples(
    source: ImageSource,
    extractor: Extractor,
    reference: Reference | None,
    protocol: Protocol = PROTOCOLS["free"],
    metrics: Sequence[Metric] | None = None,
    batch_size: int = 64,
    lpips_weights: str | None = None,
) -> Record:
    """Measure the images of `source`; `metrics` defaults to the protocol's.

    Raises UserError where the protocol is not kept, or where a metric lacks what it needs.
    """
    started = time.perf_counter()
    metrics = tuple(protocol.metrics if metrics is None else metrics)
    split = reference.split if reference else None
    unsure = protocol.check(
        source.count,
        source.label_plan,
        extractor.name,
        extractor.resize,
        split,
        measured=source.split,
    )
    if reference is not None:
        reference.check(extractor)
    check_metrics(metrics, extractor, reference, source.has_originals)
    match = match_classes(source, extractor) if "accuracy" in metrics else ClassMatch()
    needs = needs_of(metrics, protocol.is_splits, lpips_weights, classes=match.ids)
    collected = collect(source.batches(batch_size), source.count, extractor, needs, batch_size)
    values = measure(collected, reference, extractor, metrics)
    return make_record(
        metrics=values,
        comparable=comparable_facts(source, extractor, reference, protocol),
        samples={**source.describe(), "hash": collected.image_hash},
        reference=reference.describe() if reference else None,
        warnings=[*unsure, *match.warnings, *warnings_of(collected, source, extractor, reference)],
        seconds=time.perf_counter() - started,
    )


def comparable_facts(
    source: ImageSource, extractor: Extractor, reference: Reference | None, protocol: Protocol
) -> dict[str, Any]:
    """What must agree for two numbers to be comparable."""
    return {
        "extractor": extractor.describe(),
        "reference": reference.hash if reference else None,
        "reference_images": reference.moments.count if reference else None,
        "samples": source.count,
        "labels": source.label_plan,
        "protocol": protocol.describe(),
        "metric_versions": VERSIONS,
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
