"""From collected features to named numbers.

Names carry their network: FID, sFID, IS and KID stand alone only for the published TF-compatible
Inception weights with TensorFlow's resize, else FD(name), sFD(name), IS(name), KD(name). FID of
fewer than 50,000 images carries N.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.evaluation.collect import Collected, Needs
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.protocols import Metric, Protocol
from tessellar.evaluation.references import Reference
from tessellar.measures.density_coverage import density_coverage
from tessellar.measures.frechet import distance_at_infinity, frechet_distance, mean_ratio
from tessellar.measures.gaussian_mmd import cmmd
from tessellar.measures.inception_score import SplitRule
from tessellar.measures.kid import kernel_distance
from tessellar.measures.mind import mind
from tessellar.measures.precision_recall import precision_recall
from tessellar.networks.standard import FDR6_VALIDATION

FULL_COUNT = 50_000
KEPT_SAMPLES = 50_000  # features kept for KID, precision and recall
VERSIONS = {"fd": 1, "sfd": 1, "is": 1, "kid": 1, "pr": 1, "accuracy": 1, "paired": 1, "lpips": 1}
"""Raised when a metric's value changes for the same images; part of a record's fingerprint."""
FIRST_METRICS = tuple(VERSIONS)
OF_FEATURES: set[Metric] = {"kid", "pr", "mind", "cmmd", "dc"}
"""Compare features of samples with those of the reference, of which statistics hold none."""
OF_CLASSES: tuple[Metric, ...] = ("is", "accuracy")
OF_PIXELS: tuple[Metric, ...] = ("paired", "lpips")


def versions_of_metrics() -> dict[str, int]:
    """For a record: those that were always there, and later ones that have changed, so that a new
    metric leaves the fingerprints of older records as they were.
    """
    return {name: n for name, n in VERSIONS.items() if name in FIRST_METRICS or n > 1}


def needs_of(
    metrics: Iterable[Metric],
    is_splits: SplitRule,
    lpips: nn.Module | None = None,
    classes: Tensor | None = None,
) -> Needs:
    """What one pass over the samples must collect; `classes` are the network's of each label
    (`class_match.py`), `lpips` is the network of that metric.
    """
    chosen = set(metrics)
    return Needs(
        spatial="sfd" in chosen,
        score=is_splits if "is" in chosen else None,
        keep=KEPT_SAMPLES if chosen & {*OF_FEATURES, "fdinf"} else 0,
        classes=classes if "accuracy" in chosen else None,
        paired=bool(chosen & {"paired", "lpips"}),
        lpips=lpips,
    )


def applicable(
    metrics: Sequence[Metric], extractors: Sequence[Extractor]
) -> list[tuple[Metric, ...]]:
    """Which metrics each network can measure: one alone has to measure all, of several those that
    can; measures of pixels go to the first.
    """
    if len(extractors) == 1:
        return [tuple(metrics)]
    chosen: list[tuple[Metric, ...]] = []
    for place, extractor in enumerate(extractors):
        own: list[Metric] = []
        for metric in metrics:
            unfit = metric in OF_CLASSES and not extractor.num_classes
            unfit = unfit or (metric == "sfd" and extractor.spatial_dim is None)
            if not unfit and (metric not in OF_PIXELS or place == 0):
                own.append(metric)
        chosen.append(tuple(own))
    for metric in metrics:
        if not any(metric in own for own in chosen):
            what = "spatial features" if metric == "sfd" else "classes"
            networks = ", ".join(extractor.name for extractor in extractors)
            raise UserError(f"metric {metric!r} needs a network with {what}; {networks} have none")
    return chosen


def distance_name(extractor: Extractor, count: int, reconstructions: bool = False) -> str:
    """`FID`, `FID-10k`, `rFID`, `FD(name)`, `rFD(name)`."""
    name = ("r" if reconstructions else "") + extractor.distance
    if extractor.distance.startswith("FID") and count < FULL_COUNT:
        return f"{name}-{count // 1000}k" if count % 1000 == 0 else f"{name}-{count}"
    return name


def named(metric: str, extractor: Extractor) -> str:
    """`metric` for the network of FID, `metric(name)` for any other."""
    short = {"sFID": "sFD", "KID": "KD", "FID-infinity": "FD-infinity"}.get(metric, metric)
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
        if metric in OF_CLASSES and not extractor.num_classes:
            raise UserError(
                f"metric {metric!r} needs a network with classes, and {extractor.name} has none; leave it out of "
                "--metrics, or give a classifier (inception)"
            )
        if metric == "sfd" and extractor.spatial_dim is None:
            raise UserError(
                f"{extractor.name} has no spatial features; only the Inception network serves for sFID"
            )
        if metric in ("fd", "sfd", "fdinf", "fdr", *OF_FEATURES) and reference is None:
            raise UserError(f"metric {metric!r} compares with a reference; give --reference")
        if metric in OF_FEATURES and reference is not None and reference.features is None:
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
    samples: Collected, reference: Reference | None, extractor: Extractor, metrics: Sequence[Metric]
) -> dict[str, float]:
    """Values by name, in the order of `metrics`, which `check_metrics` has passed."""
    values: dict[str, float] = {}
    if "fdr" in metrics and "fd" not in metrics:  # which it is made of
        metrics = ("fd", *metrics)
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
        case "kid" | "pr" | "mind" | "cmmd" | "dc" if (
            samples.features is not None
            and reference is not None
            and reference.features is not None
        ):
            return _neighbours(metric, samples.features, reference.features, extractor)
        case "fdinf" if samples.features is not None and reference is not None:
            features = samples.features.to(extractor.device)
            return {
                named("FID-infinity", extractor): distance_at_infinity(features, reference.moments)
            }
        case "fdr":
            return {}  # of all networks together: `ratios`
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


def ratios(
    distances: dict[str, float], validation: dict[str, float] | None, protocol: Protocol
) -> dict[str, float]:
    """Each network's distance over that of the `validation` images, and their mean. It is called
    FDr^6 where the protocol is that of the paper, whose own denominators then count, else by the
    names of its networks.
    """
    published = protocol.name == "fdr6"
    against = FDR6_VALIDATION if published else validation
    assert against is not None
    values = {}
    for name, distance in distances.items():
        values[f"FDr({name})"] = mean_ratio({name: distance}, against)
    if len(distances) > 1:
        name = "FDr^6" if published else f"FDr({', '.join(distances)})"
        values[name] = mean_ratio(distances, against)
    return values


def _neighbours(
    metric: str, samples: Tensor, reference: Tensor, extractor: Extractor
) -> dict[str, float]:
    features = (samples.to(extractor.device), reference.to(extractor.device))
    match metric:
        case "kid":
            kid = kernel_distance(*features)
            name = named("KID", extractor)
            return {name: kid.mean, f"{name} std": kid.std}
        case "mind":
            return {named("MIND", extractor): mind(*features)}
        case "cmmd":
            name = "CMMD" if extractor.name == "clip-336" else f"CMMD({extractor.name})"
            return {name: cmmd(*features)}
        case "dc":
            found = density_coverage(*features)
            density = named("density", extractor)
            return {density: found.density, named("coverage", extractor): found.coverage}
    both = precision_recall(*features)
    return {named("precision", extractor): both.precision, named("recall", extractor): both.recall}
