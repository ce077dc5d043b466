"""Probes of what a tokenizer's features tell: classes, and captions.

The features of every image are computed once; then each probe is fitted to those of the training
images and scored on those of the validation images. Which classes are right is never seen by the
tokenizer, whose weights do not move.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.evaluation.sources import ImageSource
from tessellar.evaluation.token_views import View
from tessellar.images import from_uint8
from tessellar.measures.codes import Purity, columns, purity
from tessellar.measures.probes import (
    ROWS,
    chosen_penalty,
    neighbour_classes,
    ranks,
    ridge,
    ridge_classes,
    standard_of,
)
from tessellar.progress import Progress
from tessellar.protocol.layout import Layout
from tessellar.protocol.ranges import check_number, check_whole

Pooling = Literal["mean", "flat"]
Probe = Literal["linear", "softmax", "attentive", "knn", "purity", "retrieval"]
PROBES: tuple[Probe, ...] = ("linear", "softmax", "attentive", "knn", "purity", "retrieval")
WORDS = 4096  # the commonest of the training captions


@dataclass(frozen=True)
class ProbeProtocol:
    """How probes are fitted; part of a record's fingerprint.

    `pooling`: the mean over positions, or all positions side by side (`flat`), for every probe but
    the attentive one, which reads positions. `penalties`: of the ridge (`linear`, `retrieval`), of
    which the best on every tenth training image is taken. `neighbours` and `temperature` of `knn`.
    `softmax` and `attentive` are trained by AdamW (`lr`, `weight_decay`, betas 0.9 and 0.99) with
    a cosine to 0 for `epochs` epochs of batches of `batch_size`, `repeats` times with seeds from
    `seed` on; `heads` of the attentive probe's one query.
    """

    pooling: Pooling = "mean"
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    neighbours: int = 20
    temperature: float = 0.07
    epochs: int = 10
    lr: float = 0.003
    weight_decay: float = 1e-4
    batch_size: int = 256
    heads: int = 4
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("neighbours", "epochs", "batch_size", "heads", "repeats"):
            check_whole(f"protocol.{name}", getattr(self, name), least=1, most=1_000_000)
        check_whole("protocol.seed", self.seed, least=0, most=2**31)
        check_number("protocol.temperature", self.temperature, above=0)
        check_number("protocol.lr", self.lr, above=0)
        check_number("protocol.weight_decay", self.weight_decay, least=0)
        if not self.penalties:
            raise UserError("protocol.penalties is empty; a ridge needs at least one")
        for penalty in self.penalties:
            check_number("protocol.penalties", penalty, above=0)


class Features(NamedTuple):
    """Of a set: vectors [M, N, C] and, where the images have any, labels [M]."""

    vectors: Tensor
    labels: Tensor | None

    def pooled(self, pooling: Pooling) -> Tensor:
        """One vector an image."""
        if pooling == "flat":
            return rearrange(self.vectors, "m n c -> m (n c)")
        return self.vectors.mean(1)


@torch.no_grad()
def features_of(
    source: ImageSource, looks: Mapping[str, View], device: torch.device, batch_size: int
) -> dict[str, Features]:
    """Features of every image of `source` by the name of their view, in the order of the set."""
    vectors: dict[str, list[Tensor]] = {name: [] for name in looks}
    labels = []
    with Progress("features", source.count, "images", quiet=False) as bar:
        for batch in source.batches(batch_size):
            images = from_uint8(batch.images).to(device)
            for name, look in looks.items():
                vectors[name].append(look(images).cpu())
            if batch.labels is not None:
                labels.append(batch.labels)
            bar.update(len(images))
    together = torch.cat(labels) if labels else None
    return {name: Features(torch.cat(parts), together) for name, parts in vectors.items()}


def classes_of(train: Features, test: Features) -> int:
    """Number of classes; raises UserError where images have none to probe for."""
    if train.labels is None or test.labels is None:
        raise UserError(
            "this data set has no classes: of the probes only `retrieval` reads captions"
        )
    if int(train.labels.min()) < 0 or int(test.labels.min()) < 0:
        raise UserError("some images of this data set have no class")
    count = int(max(train.labels.max(), test.labels.max())) + 1
    if len(train.labels.unique()) < 2:
        raise UserError("a probe tells classes apart, and the training images are all of one")
    return count


def accuracies(
    probe: Probe, train: Features, test: Features, protocol: ProbeProtocol
) -> list[float]:
    """Shares of the validation images whose class the probe finds; one for each seed where it has
    one.
    """
    classes = classes_of(train, test)
    assert train.labels is not None and test.labels is not None
    if probe in ("linear", "knn"):
        known = train.pooled(protocol.pooling)
        asked = test.pooled(protocol.pooling)
        if probe == "linear":
            found = ridge_classes(known, train.labels, asked, classes, protocol.penalties)
        else:
            standard = standard_of(known)
            found = neighbour_classes(
                standard(known),
                train.labels,
                standard(asked),
                classes,
                count=protocol.neighbours,
                temperature=protocol.temperature,
            )
        return [float((found == test.labels).double().mean())]
    scores = []
    for repeat in range(protocol.repeats):
        generator = torch.Generator().manual_seed(protocol.seed + repeat)
        head = trained_head(probe == "attentive", train, classes, protocol, generator)
        with torch.no_grad():
            parts = [head(part) for part in _inputs(head, test, protocol).split(ROWS)]
        found = torch.cat(parts).argmax(1)
        scores.append(float((found == test.labels).double().mean()))
    return scores


class LinearHead(nn.Module):
    """Standardised vectors [M, D] to classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.out = nn.Linear(width, classes)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.out(self.norm(vectors))


class AttentiveHead(nn.Module):
    """Sequences [M, N, C] to classes: one learned query reads them, at learned positions, with
    `heads` heads of `width` / `heads` channels.
    """

    def __init__(self, length: int, channels: int, classes: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps=1e-6, affine=False)
        self.positions = nn.Parameter(torch.zeros(length, channels))
        self.query = nn.Parameter(torch.zeros(heads, width // heads))
        self.keys = nn.Linear(channels, width)
        self.values = nn.Linear(channels, width)
        self.out = nn.Linear(width, classes)
        self.heads = heads

    def forward(self, vectors: Tensor) -> Tensor:
        x = rearrange(self.norm(rearrange(vectors, "m n c -> m c n")), "m c n -> m n c")
        keys = rearrange(self.keys(x + self.positions), "m n (h d) -> m h n d", h=self.heads)
        values = rearrange(self.values(x), "m n (h d) -> m h n d", h=self.heads)
        scores = (keys * self.query[:, None]).sum(-1) * keys.shape[-1] ** -0.5
        read = (scores.softmax(-1)[..., None] * values).sum(2)
        return self.out(rearrange(read, "m h d -> m (h d)"))


def _inputs(head: nn.Module, features: Features, protocol: ProbeProtocol) -> Tensor:
    if isinstance(head, AttentiveHead):
        return features.vectors
    return features.pooled(protocol.pooling)


def trained_head(
    attentive: bool,
    train: Features,
    classes: int,
    protocol: ProbeProtocol,
    generator: torch.Generator,
) -> nn.Module:
    """A head after its epochs, in eval mode; all chance comes from `generator`."""
    assert train.labels is not None
    _, length, channels = train.vectors.shape
    if attentive:
        width = protocol.heads * max(1, 64 // protocol.heads)
        head: nn.Module = AttentiveHead(length, channels, classes, protocol.heads, width)
    else:
        head = LinearHead(train.pooled(protocol.pooling).shape[1], classes)
    start(head, generator)
    inputs = _inputs(head, train, protocol)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=protocol.lr, betas=(0.9, 0.99), weight_decay=protocol.weight_decay
    )
    size = min(protocol.batch_size, len(inputs))
    steps = protocol.epochs * (len(inputs) // size)
    step = 0
    head.train()
    for _ in range(protocol.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(size):
            if len(rows) < size:
                continue  # a small last batch would weigh more, and may be a single image
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr * (1 + cos(pi * step / steps)) / 2
            loss = F.cross_entropy(head(inputs[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return head.eval()


def start(head: nn.Module, generator: torch.Generator) -> None:
    """Matrices normal of deviation (inputs)^-0.5, biases 0; the query and the positions are 0."""
    for part in head.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5, generator=generator)
            nn.init.zeros_(part.bias)


class Purities(NamedTuple):
    """Over all positions, the mean of each position alone, and both with shuffled labels."""

    whole: Purity
    by_position: Purity
    shuffled: Purity
    shuffled_by_position: Purity


def purities(tokens: Tensor, labels: Tensor, layout: Layout, seed: int) -> Purities:
    """How much the codes of images, tokens [B, N] or [B, N, F], tell of their labels [B]; factors
    and bits each count as codes of their own.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = _purities(tokens, labels, layout)
    return Purities(*found, *_purities(tokens, labels[order], layout))


def _purities(tokens: Tensor, labels: Tensor, layout: Layout) -> tuple[Purity, Purity]:
    """Over all positions of a codebook, averaged over codebooks; and averaged over positions."""
    books: dict[str, list[Tensor]] = {}
    alone = []
    for column in columns(tokens, layout):
        books.setdefault(column.book, []).append(column.codes)
        alone.append(purity(column.codes, labels))
    together = []
    for parts in books.values():
        together.append(purity(torch.cat(parts), labels.repeat(len(parts))))
    return _mean(together), _mean(alone)


def _mean(found: Sequence[Purity]) -> Purity:
    shares = [item.share for item in found]
    information = [item.information for item in found]
    return Purity(sum(shares) / len(found), sum(information) / len(found))


class CaptionVectors:
    """Captions as unit vectors over the `WORDS` commonest words of training captions: counts times
    log(captions / captions with the word).
    """

    def __init__(self, captions: Sequence[str]) -> None:
        frequency: Counter[str] = Counter()
        for caption in captions:
            frequency.update(set(words(caption)))
        common = frequency.most_common(WORDS)
        if not common:
            raise UserError("the training captions hold no words")
        self.places = {word: place for place, (word, _) in enumerate(common)}
        counts = torch.tensor([count for _, count in common], dtype=torch.float64)
        # A word that every caption has tells nothing; 1 more keeps a set of one caption alive.
        self.weights = torch.log((len(captions) + 1) / counts)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """float64 [M, words]; zero for a caption of unknown words."""
        table = torch.zeros(len(captions), len(self.places), dtype=torch.float64)
        for row, caption in enumerate(captions):
            for word in words(caption):
                if word in self.places:
                    table[row, self.places[word]] += 1
        return F.normalize(table * self.weights, dim=-1)


def words(caption: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    spaced = "".join(c if c.isalnum() else " " for c in caption.lower())
    return spaced.split()


class Retrieval(NamedTuple):
    """Shares of queries that find a right candidate among the first 1, 5 and 10, each way."""

    texts: tuple[float, ...]
    images: tuple[float, ...]
    candidates: int


def retrieval(
    train: Tensor,
    train_captions: Sequence[str],
    test: Tensor,
    test_captions: Sequence[str],
    penalties: tuple[float, ...],
) -> Retrieval:
    """Captions found by images, and images by captions, among the validation set.

    A ridge of training features [N, D] predicts the vectors of captions; the cosine of prediction
    and caption ranks. Images of equal captions are right for each other's.
    """
    caption_vectors = CaptionVectors(train_captions)
    standard = standard_of(train)
    known = standard(train)
    targets = caption_vectors(train_captions)
    fitted = ridge(known, targets, chosen_penalty(known, targets, penalties))
    predicted = F.normalize(fitted(standard(test)), dim=-1)
    scores = predicted @ caption_vectors(test_captions).T
    kinds = {caption: number for number, caption in enumerate(dict.fromkeys(test_captions))}
    groups = torch.tensor([kinds[caption] for caption in test_captions])
    found = []
    for table in (scores, scores.T):
        before = ranks(table, groups)
        found.append(tuple(float((before < k).double().mean()) for k in (1, 5, 10)))
    return Retrieval(found[0], found[1], len(test_captions))
