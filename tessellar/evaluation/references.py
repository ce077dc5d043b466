"""Reference statistics: what samples are compared with. From a data set, a folder, an npz of images
or of statistics.

Computed once for each extractor and kept in a cache folder under a fingerprint of images and
extractor. The `hash` that records carry is that of the pixels, so a folder of PNG files, an npz and
a data set of equal images are one reference. Foreign statistics are read under the names that the
field uses (`mu`, `ref_mu`, `mu_s`, ...).
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessellar.data.dataset import digest
from tessellar.distributed import broadcast, rank
from tessellar.errors import UserError
from tessellar.evaluation import npz
from tessellar.evaluation.collect import Collected, Needs, collect
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.sources import ArrayImages, ImageSource, open_images
from tessellar.measures.pixels import array_hash
from tessellar.measures.statistics import Moments
from tessellar.places import cache_folder

KEPT_FEATURES = 10_000
"""Images of a reference whose features are kept for KID, precision and recall; the ADM reference batch has as many."""
VERSION = 2  # of cached files
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
        return {
            "name": self.name,
            "hash": self.hash,
            "images": self.moments.count,
            "split": self.split,
        }


def reference_from(
    source: ImageSource,
    extractor: Extractor,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
) -> Reference:
    """Statistics of a source's images, read from the cache if they are there; all ranks take part."""
    path = None if cache_dir is None else cache_folder(cache_dir) / cache_name(source, extractor)
    cached = broadcast(
        load_statistics(path) if path is not None and rank() == 0 and path.is_file() else None
    )
    if cached is not None:
        return cached
    needs = Needs(spatial=extractor.spatial_dim is not None, keep=KEPT_FEATURES)
    collected = collect(source.batches(batch_size), source.count, extractor, needs, batch_size)
    reference = reference_of(collected, source, extractor)
    if path is not None and rank() == 0:
        save_statistics(reference, path)
    return reference


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
    path = Path(path)
    arrays = npz.names(path) if path.suffix == ".npz" and path.is_file() else set()
    if arrays.isdisjoint(NAMES["mu"]):
        images = open_images(path, as_samples=False, size=size if path.is_dir() else None)
        return reference_from(images, extractor, cache_dir, batch_size)
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
    arrays = {
        "mu": reference.moments.mean,
        "sigma": reference.moments.cov,
        "features": reference.features,
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    plain = {name: value.cpu().numpy() for name, value in arrays.items() if value is not None}
    npz.write_arrays(Path(path), {**plain, "meta": np.array(json.dumps(meta))})


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
    meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    return Reference(
        name=meta.get("name", path.stem),
        hash=meta.get("hash", array_hash([arrays["mu"], arrays["sigma"]])),
        moments=_moments(arrays, "", meta.get("count")),
        spatial=_moments(arrays, "_s", meta.get("count"))
        if {"mu_s", "sigma_s"} <= set(arrays)
        else None,
        features=torch.from_numpy(arrays["features"])
        if "features" in arrays and "meta" in arrays
        else None,
        split=meta.get("split"),
        extractor=meta.get("extractor", {}),
        warnings=tuple(meta.get("warnings", ())),
        class_names=tuple(meta.get("class_names", ())),
        class_counts=tuple(meta.get("class_counts", ())),
    )


def _moments(arrays: dict[str, np.ndarray], suffix: str, count: int | None) -> Moments:
    mean, cov = (
        torch.from_numpy(arrays[name + suffix].astype(np.float64)) for name in ("mu", "sigma")
    )
    return Moments(mean, cov, count)
