"""From collected features to named numbers.

Names carry their network: FID, sFID, IS and KID stand alone only for the published TF-compatible
Inception weights with TensorFlow's resize, else FD(name), sFD(name), IS(name), KD(name). FID of
fewer than 50,000 images carries N.
"""

from collections.abc import Iterable

from torch import Tensor

from tessellar.errors import UserError
from tessellar.evaluation.collect import Collected, Needs
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.lpips import load_lpips
from tessellar.evaluation.protocols import Metric
from tessellar.evaluation.references import Reference
from tessellar.measures.frechet import frechet_distance
from tessellar.measures.inception_score import SplitRule
from tessellar.measures.kid import kernel_distance
from tessellar.measures.precision_recall import precision_recall

FULL_COUNT = 50_000
KEPT_SAMPLES = 50_000  # features kept for KID, precision and recall
VERSIONS = {"fd": 1, "sfd": 1, "is": 1, "kid": 1, "pr": 1, "accuracy": 1, "paired": 1, "lpips": 1}
"""Raised when a metric's value changes for the same images; part of a record's fingerprint."""


def needs_of(
    metrics: Iterable[Metric],
    is_splits: SplitRule,
    lpips_weights: str | None = None,
    classes: Tensor | None = None,
) -> Needs:
    """What one pass over the samples must collect; `classes` are the network's of each label
    (`class_match.py`).
    """
    chosen = set(metrics)
    return Needs(
        spatial="sfd" in chosen,
        score=is_splits if "is" in chosen else None,
        keep=KEPT_SAMPLES if chosen & {"kid", "pr"} else 0,
        classes=classes if "accuracy" in chosen else None,
        paired=bool(chosen & {"paired", "lpips"}),
        lpips=load_lpips(lpips_weights) if "lpips" in chosen else None,
    )


def distance_name(extractor: Extractor, count: int, reconstructions: bool = False) -> str:
    """`FID`, `FID-10k`, `rFID`, `FD(name)`, `rFD(name)`."""
    name = ("r" if reconstructions else "") + extractor.distance
    if extractor.distance.startswith("FID") and count < FULL_COUNT:
        return f"{name}-{count // 1000}k" if count % 1000 == 0 else f"{name}-{count}"
    return name


def named(metric: str, extractor: Extractor) -> str:
    """`metric` for the network of FID, `metric(name)` for any other."""
    short = {"sFID": "sFD", "KID": "KD"}.get(metric, metric)
    return (
        metric
        if extractor.distance == "FID"
        else f"{short}{extractor.distance.removeprefix('FD').removeprefix('FID')}"
    )


def check_metrics(
    metrics: Iterable[Metric],
    extractor: Extractor,
    reference: Reference | None,
    has_originals: bool,
) -> None:
    """Raise UserError, before any image is made, where a metric lacks what it needs."""
    for metric in metrics:
        if not extractor.dim and metric not in ("paired", "lpips"):
            raise UserError(
                f"metric {metric!r} needs a feature network, and --extractor {extractor.name} is none"
            )
        if metric == "sfd" and extractor.spatial_dim is None:
            raise UserError(
                f"{extractor.name} has no spatial features; only the Inception network serves for sFID"
            )
        if metric in ("fd", "sfd", "kid", "pr") and reference is None:
            raise UserError(f"metric {metric!r} compares with a reference; give --reference")
        if metric in ("kid", "pr") and reference is not None and reference.features is None:
            raise UserError(
                f"the reference {reference.name} has statistics only; {metric} needs its images or features"
            )
        if metric == "sfd" and reference is not None and reference.spatial is None:
            raise UserError(
                f"the reference {reference.name} has no spatial statistics (mu_s, sigma_s) for sFID"
            )
        if metric in ("paired", "lpips") and not has_originals:
            raise UserError(
                f"metric {metric!r} compares reconstructions with their originals; these are no reconstructions"
            )


def measure(
    samples: Collected, reference: Reference | None, extractor: Extractor, metrics: Iterable[Metric]
) -> dict[str, float]:
    """Values by name, in the order of `metrics`, which `check_metrics` has passed."""
    values: dict[str, float] = {}
    for metric in metrics:
        values |= values_of(metric, samples, reference, extractor)
    return values


def values_of(
    metric: Metric, samples: Collected, reference: Reference | None, extractor: Extractor
) -> dict[str, float]:
    match metric:
        case "fd" if reference is not None:
            name = distance_name(extractor, samples.count, samples.paired is not None)
            return {name: frechet_distance(samples.moments, reference.moments)}
        case "sfd" if (
            samples.spatial is not None and reference is not None and reference.spatial is not None
        ):
            return {named("sFID", extractor): frechet_distance(samples.spatial, reference.spatial)}
        case "is" if samples.score is not None:
            name = named("IS", extractor)
            return {name: samples.score.mean, f"{name} std": samples.score.std}
        case "kid" | "pr" if (
            samples.features is not None
            and reference is not None
            and reference.features is not None
        ):
            return _neighbours(metric, samples.features, reference.features, extractor)
        case "accuracy" if samples.accuracy is not None:
            return {"accuracy": samples.accuracy}
        case "paired" if samples.paired is not None:
            return {"PSNR": samples.paired.psnr, "SSIM": samples.paired.ssim}
        case "lpips" if samples.paired is not None and samples.paired.lpips is not None:
            return {"LPIPS": samples.paired.lpips}
        case "accuracy":
            raise UserError(
                "class accuracy needs the labels of the samples (arr_1 in an npz, or a folder a class)"
            )
    raise AssertionError(f"{metric} was not checked, or not collected")


def _neighbours(
    metric: str, samples: Tensor, reference: Tensor, extractor: Extractor
) -> dict[str, float]:
    features = (samples.to(extractor.device), reference.to(extractor.device))
    if metric == "kid":
        kid = kernel_distance(*features)
        name = named("KID", extractor)
        return {name: kid.mean, f"{name} std": kid.std}
    both = precision_recall(*features)
    return {named("precision", extractor): both.precision, named("recall", extractor): both.recall}
