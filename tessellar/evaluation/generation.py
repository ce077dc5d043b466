"""Images that a model makes while they are measured: class-balanced or data-conditioned samples,
and reconstructions.

Sample i has seed `seed + i` and, class-conditional, label i mod C, whatever the number of ranks: 1
and 8 processes give the same set. Nothing is written to disk and no float image is kept.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.checkpoints.weights import fingerprint
from tessellar.data.dataset import IndexedDataset, digest
from tessellar.distributed import barrier, own_share, rank
from tessellar.errors import UserError
from tessellar.evaluation.sources import ImageBatch, ImageSource, counts_of
from tessellar.images import from_uint8, to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.progress import Progress
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.ranges import check_whole
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.kept import KeptSet, own_part
from tessellar.sampling.run import (
    MAX_IMAGES,
    Drawing,
    as_uint8,
    balanced_labels,
    check_seed,
    proportional_labels,
    random_labels,
)
from tessellar.sampling.settings import Sampling


class GeneratedImages(ImageSource):
    """`count` samples; without classes, sample i follows the caption of item i of `data` (again
    from 0 at its end).

    `class_names` are those of the model's classes (default: as the model names them). Classes come
    equally often, or in the proportions of `class_counts`, or with `random_classes` as they are
    drawn.
    """

    def __init__(
        self,
        model: ImageGenerator,
        count: int,
        sampling: Sampling,
        seed: int = 0,
        data: IndexedDataset | None = None,
        precision: str = "float32",
        facts: dict[str, Any] | None = None,
        class_names: Sequence[str] = (),
        class_counts: Sequence[int] = (),
        random_classes: bool = False,
    ) -> None:
        check_whole("count", count, least=1, most=MAX_IMAGES)
        check_seed(seed, count)
        self.model = model
        self.count = count
        self.sampling = sampling
        self.seed = seed
        self.precision = precision
        self.name = "samples"
        self.facts = facts or {}
        self.data = data
        classes = (
            model.conditioner.num_classes
            if isinstance(model.conditioner, ClassConditioner)
            else None
        )
        self.labels = None
        self.label_plan = "data"
        if classes is not None and class_counts:
            self.labels = torch.tensor(proportional_labels(count, class_counts))
        elif classes is not None and random_classes:
            self.labels = torch.tensor(random_labels(count, classes, seed))
            self.label_plan = "random"
        elif classes is not None:
            self.labels = torch.tensor(balanced_labels(count, classes))
            self.label_plan = "balanced"
        self.class_counts = counts_of(self.labels)
        names = tuple(class_names or getattr(model, "class_names", ()))
        self.class_names = names if len(names) == classes else ()
        if classes is None and data is None:
            raise UserError(
                "this generator is conditioned on text: give --data, whose captions its samples follow"
            )
        if classes is None and data is not None and not data.has_captions:
            raise UserError(
                "this generator is conditioned on text, and the data set given has no captions"
            )

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        yield from self.of(own_share(self.count), batch_size)

    def of(self, share: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """The images of these places."""
        if self.labels is None:
            yield from self._captioned(share, batch_size)
            return
        drawing = Drawing(self.sampling, self.seed, batch_size, self.precision)
        for places, images in drawing.of_classes(self.model, self.labels.tolist(), share):
            index = torch.tensor(places)
            yield ImageBatch(images, index, self.labels[index])

    def _captioned(self, share: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """Conditions are made batch by batch: the features of 30,000 captions would not fit into
        memory.
        """
        assert self.data is not None
        device = next(self.model.parameters()).device.type
        for index in torch.tensor(share, dtype=torch.int64).split(batch_size):
            batch: Any = self.data.batch((index % len(self.data)).tolist())
            seeds = (self.seed + index).tolist()
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                tokens = self.model.sample_tokens(
                    self.model.conditioner(batch), self.sampling, seeds
                )
            yield ImageBatch(as_uint8(self.model.decode(tokens)), index)

    def fingerprint(self) -> str:
        return digest(weights=fingerprint(self.model), **self.describe())

    def describe(self) -> dict[str, Any]:
        made = {
            "sampling": self.sampling.describe(),
            "seed": self.seed,
            "precision": self.precision,
        }
        return {**super().describe(), **made, **self.facts}


class KeptImages(ImageSource):
    """Generated images that stay in a folder: an interrupted evaluation makes only those that are
    missing, and shards of a set may be made by several machines.
    """

    def __init__(self, generated: GeneratedImages, folder: Path) -> None:
        self.generated = generated
        self.name = generated.name
        self.count = generated.count
        self.label_plan = generated.label_plan
        self.class_names = generated.class_names
        self.class_counts = generated.class_counts
        plan = {**generated.describe(), "tensors": fingerprint(generated.model)}
        self.kept = KeptSet(folder, plan, lambda index: f"{index:08d}.png")

    def make(self, batch_size: int, shard: tuple[int, int] = (0, 1)) -> int:
        """Make what is missing of a shard; returns how many images of the set are missing then."""
        todo = self.kept.missing(own_part(self.count, shard))
        quiet = rank() > 0
        with Progress("sampling", len(todo), "images", quiet=quiet) as bar:
            for batch in self.generated.of(todo, batch_size):
                self.kept.write(batch.index.tolist(), batch.images)
                bar.update(len(batch.images))
        barrier()
        self.kept.look()
        return len(self.kept.missing(range(self.count)))

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        self.make(batch_size)
        for index in torch.tensor(own_share(self.count), dtype=torch.int64).split(batch_size):
            images = torch.stack([self.kept.read(place) for place in index.tolist()])
            labels = self.generated.labels
            yield ImageBatch(images, index, None if labels is None else labels[index])

    def fingerprint(self) -> str:
        return self.generated.fingerprint()

    def describe(self) -> dict[str, Any]:
        return self.generated.describe()


class Reconstructions(ImageSource):
    """Images of another source through a tokenizer, each beside its original."""

    has_originals = True

    def __init__(
        self, tokenizer: Tokenizer, originals: ImageSource, facts: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.originals = originals
        self.crop = originals.crop
        self.facts = facts or {}
        self.count = originals.count
        self.split = originals.split
        self.label_plan = originals.label_plan
        self.class_names = originals.class_names
        self.class_counts = originals.class_counts
        self.name = f"reconstructions of {originals.name}"

    @property
    def warnings(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.originals.warnings

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        device = next(self.tokenizer.parameters()).device
        for batch in self.originals.batches(batch_size):
            self._check_size(batch.images)
            images = reconstruct(self.tokenizer, from_uint8(batch.images).to(device))
            yield ImageBatch(to_uint8(images).cpu(), batch.index, batch.labels, batch.images)

    def _check_size(self, images: Tensor) -> None:
        given = tuple(images.shape[-2:])
        if given != tuple(self.tokenizer.image_size):
            raise UserError(
                f"images of {self.originals.name} are {given}, the tokenizer reads "
                f"{self.tokenizer.image_size}: measure images of that size (--data.size)"
            )

    def fingerprint(self) -> str:
        return digest(weights=fingerprint(self.tokenizer), originals=self.originals.fingerprint())

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.facts}


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] through tokens and back, in eval mode; the tokenizer's mode is as before
    afterwards.
    """
    mode = tokenizer.training
    tokenizer.eval()
    try:
        return tokenizer.decode(tokenizer.encode(images))
    finally:
        tokenizer.train(mode)
