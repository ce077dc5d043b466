"""One pass over images: features of one or several networks, statistics, scores, reduced once over
ranks. The reference and the samples take it.

What grows with the number of images is 8 bytes each for a hash of the pixels, and, where KID or
precision/recall need them, the features of at most `keep` images. Batches are re-cut to one size
and the last is filled up, so that a network sees one shape and an image's features depend neither
on its neighbours' number nor on the number of processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.distributed import all_reduce_sum, gather_rows, own_share, rank
from tessellar.errors import UserError
from tessellar.evaluation.class_match import classes_of
from tessellar.evaluation.networks.extractors import Extractor, Features
from tessellar.evaluation.sources import ImageBatch
from tessellar.evaluation.subset import subset
from tessellar.measures.inception_score import InceptionScore, ScoreSums, SplitRule
from tessellar.measures.paired import PairedScores, PairedSums
from tessellar.measures.pixels import image_hashes, set_hash
from tessellar.measures.statistics import FeatureStatistics, Moments
from tessellar.progress import Progress


@dataclass(frozen=True)
class Needs:
    """What to collect besides mean and covariance; `keep` is the number of images whose features
    are kept.
    """

    spatial: bool = False
    score: SplitRule | None = None
    keep: int = 0
    classes: Tensor | None = None  # the network's class of each label, for the accuracy
    paired: bool = False
    lpips: nn.Module | None = None


Job = tuple[Extractor, Needs]
"""A network, and what to collect of what it says."""


@dataclass(frozen=True, eq=False)
class Collected:
    """A set of images as metrics see it, over all ranks; `features` [n, D] are in the order of the
    set.
    """

    count: int
    moments: Moments
    spatial: Moments | None
    features: Tensor | None
    score: InceptionScore | None
    accuracy: float | None
    paired: PairedScores | None
    image_hash: str
    duplicates: int


class Pictures:
    """What is collected of pixels, whatever networks see them: hashes, and likeness to originals."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        paired = any(needs.paired for _, needs in jobs)
        lpips = next((needs.lpips for _, needs in jobs if needs.lpips is not None), None)
        self.paired = PairedSums(lpips) if paired else None
        self.hashes: list[Tensor] = [torch.empty(0, dtype=torch.int64)]

    def update(self, batch: ImageBatch) -> None:
        """Add images."""
        self.hashes.append(image_hashes(batch.images))
        if self.paired is not None and batch.originals is not None:
            self.paired.update(batch.images, batch.originals)

    def finish(self) -> tuple[Tensor, PairedScores | None]:
        """Hashes and scores over all ranks."""
        hashes = gather_rows(torch.cat(self.hashes))
        return hashes, self.paired.compute() if self.paired is not None else None


class Collector:
    """What one network sees of `total` images; `update` with this rank's share, then `finish`."""

    def __init__(self, extractor: Extractor, total: int, needs: Needs) -> None:
        self.total = total
        self.needs = needs
        device = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
        self.statistics = FeatureStatistics(extractor.dim, device)
        self.spatial = (
            FeatureStatistics(extractor.spatial_dim or 0, device) if needs.spatial else None
        )
        self.score = (
            ScoreSums.empty(total, extractor.num_classes, needs.score) if needs.score else None
        )
        self.keep = subset(total, needs.keep)
        # Images whose class the network finds, images with a label.
        self.hits = torch.zeros(2, dtype=torch.float64)
        self.kept: list[tuple[Tensor, Tensor]] = [
            (torch.empty(0, extractor.dim), torch.empty(0, dtype=torch.int64))
        ]

    def update(self, batch: ImageBatch, features: Features) -> None:
        """Add images with their features."""
        self.statistics.update(features.features)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.update(features.spatial)
        if self.score is not None:
            self.score.update(features.logits, batch.index)
        if self.needs.keep:
            rows = torch.isin(batch.index, self.keep)
            self.kept.append((features.features.cpu()[rows], batch.index[rows]))
        if self.needs.classes is not None and batch.labels is not None:
            wanted = classes_of(batch.labels.cpu(), self.needs.classes)
            found = features.logits.argmax(dim=1).cpu() == wanted
            self.hits += torch.tensor([int(found.sum()), len(found)])

    def finish(self, hashes: Tensor, paired: PairedScores | None) -> Collected:
        """Reduce over ranks; raises UserError where images are missing or came twice."""
        statistics = self.statistics.reduce()
        if statistics.count != self.total:
            raise UserError(f"{self.total} images were announced, {statistics.count} came")
        right, labelled = all_reduce_sum(self.hits).tolist()
        features = None
        if self.needs.keep:
            kept, index = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            features = gather_rows(kept)[gather_rows(index).argsort()]
        return Collected(
            count=self.total,
            moments=statistics.moments(),
            spatial=self.spatial.reduce().moments() if self.spatial is not None else None,
            features=features,
            score=self.score.compute() if self.score is not None else None,
            accuracy=right / labelled if labelled else None,
            paired=paired,
            image_hash=set_hash(hashes),
            duplicates=len(hashes) - len(hashes.unique()),
        )


def collect(
    batches: Iterable[ImageBatch], total: int, extractor: Extractor, needs: Needs, size: int = 64
) -> Collected:
    """Extract features of this rank's `batches` in batches of `size`; `total` counts the images of
    all ranks.
    """
    return collect_all(batches, total, [(extractor, needs)], size)[0]


def collect_all(
    batches: Iterable[ImageBatch], total: int, jobs: Sequence[Job], size: int = 64
) -> list[Collected]:
    """As `collect`, for several networks: each image is made, hashed and compared with its original
    once, and seen by all of them.
    """
    collectors = [Collector(extractor, total, needs) for extractor, needs in jobs]
    pictures = Pictures(jobs)
    with Progress("features", len(own_share(total)), "images", quiet=rank() > 0) as bar:
        for batch in rebatch(batches, size):
            count = len(batch.images)
            filled = F.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, size - count))
            pictures.update(batch)
            for (extractor, _), collector in zip(jobs, collectors, strict=True):
                output = extractor(filled)
                parts = [None if part is None else part[:count] for part in output]
                collector.update(batch, Features(*parts))  # type: ignore[arg-type]
            bar.update(count)
    hashes, paired = pictures.finish()
    return [collector.finish(hashes, paired) for collector in collectors]


def rebatch(batches: Iterable[ImageBatch], size: int) -> Iterator[ImageBatch]:
    """The same images in batches of `size`, the last one shorter."""
    held: list[ImageBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(len(b.images) for b in held) >= size:
            *whole, rest = _split(_join(held), size)
            yield from whole
            held = [rest]
    if held:
        yield from (part for part in _split(_join(held), size) if len(part.images))


def _join(batches: list[ImageBatch]) -> ImageBatch:
    sizes = [tuple(batch.images.shape[2:]) for batch in batches]
    if len(set(sizes)) > 1:
        raise UserError(f"images differ in size: {', '.join(map(str, sizes))}")
    fields = []
    for column in zip(*batches, strict=True):
        fields.append(None if column[0] is None else torch.cat(column))
    return ImageBatch(*fields)


def _split(batch: ImageBatch, size: int) -> list[ImageBatch]:
    """Pieces of `size` images and the rest, which may be empty."""
    pieces = []
    for start in range(0, len(batch.images) + 1, size):
        fields = []
        for column in batch:
            fields.append(None if column is None else column[start : start + size])
        pieces.append(ImageBatch(*fields))
    return pieces
