"""Buckets: pictures of several shapes in one run, one shape a batch (aspect-ratio bucketing, as SDXL
trains, arXiv 2307.01952, appendix I).

Each picture belongs to the bucket whose proportions are nearest to its own, the logarithm of width by
height; of buckets with the same proportions, to the largest that it need not be enlarged for. Whatever
the crop leaves out is the price, so what no bucket fits well is counted and said.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tessellar.data.framing import Framing
from tessellar.data.image_file import UnreadableImage
from tessellar.data.pictures import PictureDataset
from tessellar.progress import count_of

log = logging.getLogger(__name__)
KEPT = 0.8  # share of a picture's area that a crop keeps, from which on a bucket fits
READERS = 16  # threads that wait for the disk
MANY = 20_000  # pictures, whose headers take a while
Shape = tuple[int, int]


@dataclass(frozen=True)
class Bucketing:
    """Which of the `sizes` (height, width) each sample is shown in: `of` int64 [N], and the share
    `kept` [N] of its area that the crop leaves.
    """

    sizes: tuple[Shape, ...]
    of: np.ndarray
    kept: np.ndarray

    @property
    def counts(self) -> list[int]:
        """Samples of each bucket."""
        return np.bincount(self.of, minlength=len(self.sizes)).tolist()

    def spelled(self) -> str:
        """`16 x 24: 120, 24 x 16: 80`, for messages."""
        pairs = zip(self.sizes, self.counts, strict=True)
        return ", ".join(f"{size[0]} x {size[1]}: {count:,}" for size, count in pairs)

    def tell(self, name: str, batch: int) -> None:
        """Warn of pictures that fit no bucket, and of buckets that never fill a batch of training."""
        left = int((self.kept < KEPT).sum())
        if left:
            log.warning(
                "%s: %s of %s fit no bucket (a crop leaves less than %.0f %% of them) and go to the nearest",
                name,
                f"{left:,}",
                count_of(len(self.of), "image", "images"),
                100 * KEPT,
            )
        for size, count in zip(self.sizes, self.counts, strict=True):
            if 0 < count < batch:
                log.warning(
                    "%s: bucket %d x %d has %d images, too few for a batch of %d: they are never trained on",
                    name,
                    *size,
                    count,
                    batch,
                )


@dataclass(frozen=True)
class InBuckets:
    """The framing of each sample, for the data set of a loader; it travels to the loader's workers."""

    of: np.ndarray  # int64 [N]
    framings: tuple[Framing, ...]

    def __call__(self, index: int) -> Framing:
        return self.framings[self.of[index]]


def bucketing_of(dataset: PictureDataset, sizes: Sequence[Shape]) -> Bucketing:
    """The buckets of a data set's pictures, by their headers; one that cannot be read has the first."""
    if len(dataset) >= MANY:
        log.info("reads the shapes of %s pictures", f"{len(dataset):,}")

    def shape(index: int) -> Shape:
        try:
            return dataset.shape(index)
        except UnreadableImage:
            return sizes[0]

    with ThreadPoolExecutor(READERS) as readers:
        shapes = np.array(list(readers.map(shape, range(len(dataset)))), dtype=np.int64)
    return Bucketing(tuple(sizes), *nearest_buckets(shapes.reshape(-1, 2), sizes))


def nearest_buckets(shapes: np.ndarray, sizes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray]:
    """Of pictures' `shapes` int64 [N, 2] (height, width): the nearest of `sizes`, int64 [N], and the
    share [N] of a picture that a crop to its proportions leaves.
    """
    buckets = np.array(sizes, dtype=np.int64)
    # [N, K]; the share that a crop leaves is exp(-|difference of logarithms|).
    ratios = np.log(shapes[:, :1] / shapes[:, 1:])
    distance = np.abs(ratios - np.log(buckets[:, 0] / buckets[:, 1]))
    nearest = distance.min(axis=1, keepdims=True)
    alike = distance <= nearest + 1e-9
    # Of several alike: the largest that lies within the picture, else the smallest.
    area = buckets.prod(axis=1).astype(np.float64)
    within = (shapes[:, None] >= buckets).all(axis=2)
    preference = np.where(within, area, -area)
    chosen = np.where(alike, preference, -np.inf).argmax(axis=1)
    return chosen, np.exp(-nearest[:, 0])
