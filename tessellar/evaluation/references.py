"""Reference statistics: what samples are compared with. From a data set, a folder, an npz of images
or of statistics.

Computed once for each extractor and kept in a cache folder under a fingerprint of images and
extractor. The `hash` that records carry is that of the pixels, so a folder of PNG files, an npz and
a data set of equal images are one reference. Foreign statistics are read under the names that the
field uses (`mu`, `ref_mu`, `mu_s`, ...).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessellar import npz
from tessellar.data.dataset import digest
from tessellar.distributed import broadcast, rank
from tessellar.errors import UserError
from tessellar.evaluation.collect import Collected, Needs, collect_all
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.sources import ArrayImages, ImageSource, open_images
from tessellar.measures.pixels import array_hash
from tessellar.measures.statistics import Moments, check_covariance
from tessellar.places import cache_folder
from tessellar.plain_data import parse_json
from tessellar.protocol.ranges import check_whole

KEPT_FEATURES = 10_000
"""Images of a reference whose features are kept for KID, precision and recall; the ADM reference batch has as many."""
VERSION = 2  # of cached files
SPLITS_OF_NAMES = {"adm-imagenet256": "train", "adm-imagenet512": "train"}
"""What a file of ADM's suite (VIRTUAL_imagenet256_labeled.npz) does not tell, by the name it is given."""
NAMES = {
    "mu": ("mu", "ref_mu", "mean"),
    "sigma": ("sigma", "ref_sigma", "cov"),
    "mu_s": ("mu_s", "ref_mu_s"),
    "sigma_s": ("sigma_s", "ref_sigma_s"),
    "features": ("features",),
    "meta": ("meta",),
}


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics to compare with; `extractor` is what they were computed with (empty: a foreign
    file does not say).
    """

    name: str
    hash: str
    moments: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    split: str | None = None
    extractor: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    crop: str = ""

    def check(self, extractor: Extractor) -> None:
        """Raise UserError where the statistics were computed with another network or resize."""
        theirs = self.extractor
        ours = extractor.describe()
        if theirs and theirs != ours:
            different = ", ".join(key for key in ours if theirs.get(key) != ours[key])
            raise UserError(
                f"the reference {self.name} was computed with {theirs.get('name')}: other {different}"
            )
        if self.moments.dim != extractor.dim:
            raise UserError(
                f"the reference {self.name} has {self.moments.dim} features, {extractor.name} has {extractor.dim}"
            )

    def describe(self) -> dict[str, Any]:
        """Plain data for records."""
        facts = {
            "name": self.name,
            "hash": self.hash,
            "images": self.moments.count,
            "split": self.split,
        }
        return {**facts, "crop": self.crop} if self.crop else facts


def reference_from(
    source: ImageSource,
    extractor: Extractor,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
) -> Reference:
    """Statistics of a source's images, read from the cache if they are there; all ranks take part."""
    return references_from(source, [extractor], cache_dir, batch_size)[0]


def references_from(
    source: ImageSource,
    extractors: Sequence[Extractor],
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
) -> list[Reference]:
    """As `reference_from`, for several networks: one pass over the images for all those whose
    statistics are not in the cache.
    """
    found: dict[str, Reference] = {}
    for extractor in extractors:
        path = _cached(source, extractor, cache_dir)
        kept = load_statistics(path) if path and rank() == 0 and path.is_file() else None
        kept = broadcast(kept)
        if kept is not None:
            found[extractor.name] = kept
    missing = [extractor for extractor in extractors if extractor.name not in found]
    jobs = []
    for extractor in missing:
        needs = Needs(spatial=extractor.spatial_dim is not None, keep=KEPT_FEATURES)
        jobs.append((extractor, needs))
    if jobs:
        batches = source.batches(batch_size)
        collected = collect_all(batches, source.count, jobs, batch_size)
        for extractor, seen in zip(missing, collected, strict=True):
            reference = reference_of(seen, source, extractor)
            found[extractor.name] = reference
            path = _cached(source, extractor, cache_dir)
            if path and rank() == 0:
                save_statistics(reference, path)
    return [found[extractor.name] for extractor in extractors]


def _cached(source: ImageSource, extractor: Extractor, cache: str | Path | None) -> Path | None:
    return None if cache is None else cache_folder(cache) / cache_name(source, extractor)


def reference_of(collected: Collected, source: ImageSource, extractor: Extractor) -> Reference:
    return Reference(
        name=source.name,
        hash=collected.image_hash,
        moments=collected.moments,
        spatial=collected.spatial,
        features=collected.features,
        split=source.split,
        extractor=extractor.describe(),
        warnings=source.warnings,
        class_names=source.class_names,
        class_counts=source.class_counts,
        crop=source.crop,
    )


def cache_name(source: ImageSource, extractor: Extractor) -> str:
    key = digest(
        images=source.fingerprint(),
        extractor=extractor.describe(),
        kept=KEPT_FEATURES,
        version=VERSION,
    )
    return re.sub(r"[^\w.-]+", "-", f"{source.name}-{extractor.name}-{key}.npz")


def load_reference(
    path: str | Path,
    extractor: Extractor,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
    size: int | None = None,
) -> Reference:
    """Reference from a file or folder: statistics, images, or both as in an ADM reference batch.

    Images of a folder are cropped to `size` where one is given. Raises UserError where neither is
    found, or where statistics belong to another network.
    """
    return load_references([path], [extractor], cache_dir, batch_size, size=size)[0]


def load_references(
    paths: Sequence[str | Path],
    extractors: Sequence[Extractor],
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
    size: int | None = None,
) -> list[Reference]:
    """As `load_reference`, for several networks: one path of images for all of them, or for each a
    file of its statistics, in any order where the files say whose they are.

    A path may have a name before it and a hash behind it, `NAME=FILE@HASH`: records carry the name,
    and another hash is refused. Raises UserError where a network has no statistics.
    """
    named = [NamedPath.of(str(path)) for path in paths]
    if len(named) > 1 and all(holds_statistics(one.path) for one in named):
        order = in_order_of(extractors, [one.path for one in named])
        named.sort(key=lambda one: order.index(one.path))
    files = [one.path for one in named]
    references = _load_references(files, extractors, cache_dir, batch_size, size=size)
    if len(named) == 1:
        named = named * len(references)
    return [one.named(reference) for one, reference in zip(named, references, strict=True)]


class NamedPath(NamedTuple):
    """What `NAME=FILE@HASH` says; the name and the hash may be empty."""

    path: Path
    name: str = ""
    hash: str = ""

    @classmethod
    def of(cls, text: str) -> "NamedPath":
        if Path(text).exists():
            return cls(Path(text))
        name = ""
        if "=" in text:
            name, _, text = text.partition("=")
        wanted = ""
        if "@" in text and not Path(text).exists():
            text, _, wanted = text.rpartition("@")
        return cls(Path(text), name, wanted)

    def named(self, reference: Reference) -> Reference:
        """The reference under this name; raises UserError where its hash is another."""
        if not reference.hash.startswith(self.hash):
            raise UserError(
                f"the reference {self.path} has the hash {reference.hash}, not {self.hash}: it holds other images or "
                "statistics"
            )
        if not self.name:
            return reference
        split = reference.split or SPLITS_OF_NAMES.get(self.name)
        return replace(reference, name=self.name, split=split)


def _load_references(
    paths: Sequence[Path],
    extractors: Sequence[Extractor],
    cache_dir: str | Path | None,
    batch_size: int,
    size: int | None,
) -> list[Reference]:
    if len(paths) == 1 and not holds_statistics(paths[0]):
        path = Path(paths[0])
        images = open_images(path, as_samples=False, size=size if path.is_dir() else None)
        return references_from(images, extractors, cache_dir, batch_size)
    pictures = [path for path in paths if not holds_statistics(path)]
    if pictures:
        raise UserError(
            f"--reference {pictures[0]} holds no statistics: give images once, or statistics for each network"
        )
    if len(paths) != len(extractors):
        networks = ", ".join(extractor.name for extractor in extractors)
        raise UserError(
            f"--reference names {len(paths)} files of statistics for {len(extractors)} networks ({networks}): one for "
            "each is needed, or the images themselves (a folder, an npz, train or val)"
        )
    pairs = zip(paths, extractors, strict=True)
    return [_read_statistics(path, net, cache_dir, batch_size) for path, net in pairs]


def holds_statistics(path: str | Path) -> bool:
    """Whether a file has a mean and a covariance, so that its images, if any, need not be read."""
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return False
    return not npz.names(path).isdisjoint(NAMES["mu"])


def in_order_of(extractors: Sequence[Extractor], paths: Sequence[str | Path]) -> list[Path]:
    """Files of statistics in the order of the networks they were computed with; as they are where
    one does not say it.
    """
    given = list(map(Path, paths))
    named = {}
    for path in given:
        meta = _meta(npz.read_arrays(path, {"meta": NAMES["meta"]}), path)
        named[meta.extractor.get("name")] = path
    wanted = [extractor.name for extractor in extractors]
    return [named[name] for name in wanted] if set(wanted) == set(named) else given


def _read_statistics(
    path: Path, extractor: Extractor, cache_dir: str | Path | None, batch_size: int
) -> Reference:
    arrays = npz.names(path)
    reference = load_statistics(path)
    reference.check(extractor)
    if reference.features is None and "arr_0" in arrays:
        images = reference_from(ArrayImages(path), extractor, cache_dir, batch_size)
        return replace(reference, features=images.features)
    return reference


def save_statistics(reference: Reference, path: str | Path) -> None:
    """Write a reference; `load_statistics` is its inverse, and other tools read `mu` and `sigma`."""
    kept = ("name", "hash", "split", "extractor", "warnings", "class_names", "class_counts")
    meta = {key: getattr(reference, key) for key in kept}
    meta["count"] = reference.moments.count
    if reference.crop:
        meta["crop"] = reference.crop
    arrays = {
        "mu": reference.moments.mean,
        "sigma": reference.moments.cov,
        "features": reference.features,
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    plain = {"meta": np.array(json.dumps(meta))}
    for name, value in arrays.items():
        if value is not None:
            plain[name] = value.cpu().numpy()
    npz.write_arrays(Path(path), plain)


def load_statistics(path: str | Path) -> Reference:
    """A reference from a statistics file, ours or foreign; raises UserError where `mu` or `sigma`
    is missing.
    """
    path = Path(path)
    arrays = npz.read_arrays(path, NAMES)
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{path} holds no statistics (mu and sigma); it holds {', '.join(sorted(npz.names(path)))}"
        )
    meta = _meta(arrays, path)
    mean = _real(arrays["mu"], "mu", path)
    cov = _real(arrays["sigma"], "sigma", path)
    moments = _moments(mean, cov, meta.count, path)
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        mean_s = _real(arrays["mu_s"], "mu_s", path)
        cov_s = _real(arrays["sigma_s"], "sigma_s", path)
        spatial = _moments(mean_s, cov_s, meta.count, path)
    features = None
    if "features" in arrays and "meta" in arrays:
        features = _features(arrays["features"], moments.dim, path)
    return Reference(
        name=meta.name,
        hash=meta.hash or array_hash([arrays["mu"], arrays["sigma"]]),
        moments=moments,
        spatial=spatial,
        features=features,
        split=meta.split,
        extractor=meta.extractor,
        warnings=meta.warnings,
        class_names=meta.class_names,
        class_counts=meta.class_counts,
        crop=meta.crop,
    )


@dataclass(frozen=True)
class _Meta:
    """What a statistics file of ours says of itself."""

    name: str
    hash: str = ""
    count: int | None = None
    split: str | None = None
    extractor: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    crop: str = ""


def _meta(arrays: dict[str, np.ndarray], path: Path) -> _Meta:
    """Raises UserError, naming the entry, for one of another kind than ours."""
    if "meta" not in arrays:
        return _Meta(path.stem)
    where = f"{path}: meta"
    if arrays["meta"].ndim or arrays["meta"].dtype.kind not in "US":
        raise UserError(f"{where} is not a JSON text")
    said = parse_json(
        arrays["meta"].tobytes() if arrays["meta"].dtype.kind == "S" else str(arrays["meta"]), where
    )
    if not isinstance(said, dict):
        raise UserError(f"{where} is a {type(said).__name__}, not a mapping")
    said = {"name": path.stem, **said}
    for key in ("name", "hash", "split", "crop"):
        if not isinstance(said.get(key), str) and said.get(key) is not None:
            raise UserError(f"{where}: {key} is {said[key]!r:.80}; it must be a text")
    if said.get("count") is not None:
        check_whole(f"{where}: count", said["count"], least=2, most=2**62)
    if not isinstance(said.get("extractor", {}), dict):
        raise UserError(f"{where}: extractor is {said['extractor']!r:.80}; it must be a mapping")
    for key in ("warnings", "class_names"):
        value = said.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: {key} is {value!r:.80}; it must be a list of texts")
    counts = said.get("class_counts", [])
    if not isinstance(counts, list):
        raise UserError(f"{where}: class_counts is {counts!r:.80}; it must be a list of numbers")
    for number in counts:
        check_whole(f"{where}: class_counts", number, least=0, most=2**62)
    return _Meta(
        name=said["name"] or path.stem,
        hash=said.get("hash") or "",
        count=said.get("count"),
        split=said.get("split"),
        extractor=said.get("extractor", {}),
        warnings=tuple(said.get("warnings", [])),
        class_names=tuple(said.get("class_names", [])),
        class_counts=tuple(counts),
        crop=said.get("crop") or "",
    )


def _real(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """An array of real numbers; raises UserError for complex ones, text and the like."""
    if array.dtype.kind not in "fiu":
        kind = "complex numbers" if array.dtype.kind == "c" else f"{array.dtype}"
        raise UserError(f"{path}: {name} holds {kind}; statistics are real numbers")
    return array


def _moments(mean: np.ndarray, cov: np.ndarray, count: int | None, path: Path) -> Moments:
    """Raises UserError for what is no mean and covariance of features."""
    if not mean.size:
        raise UserError(f"{path}: statistics have mean {mean.shape}, of no features")
    try:
        moments = Moments(
            torch.from_numpy(mean.astype(np.float64)),
            torch.from_numpy(cov.astype(np.float64)),
            count,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    precision = np.finfo(cov.dtype).eps if cov.dtype.kind == "f" else np.finfo(np.float64).eps
    check_covariance(moments, float(precision), str(path))
    return moments


def _features(array: np.ndarray, dim: int, path: Path) -> Tensor:
    features = torch.from_numpy(_real(array, "features", path).astype(np.float32))
    if features.ndim != 2 or features.shape[1] != dim or not len(features):
        raise UserError(
            f"{path}: features have shape {tuple(features.shape)}; needed are rows of {dim}"
        )
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"{path}: features hold values that are not finite")
    return features
