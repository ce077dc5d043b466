"""Sampling a set of images: label plans, batches, seeds. What `sample.py`, the evaluation and the
callbacks share.

Image i is drawn with the stream seeded `seed + i`, so it is the same in any batch and on any number
of processes. Two runs of N images share no stream where their seeds lie at least N apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.images import to_uint8
from tessellar.protocol.condition import Condition, Conditioner
from tessellar.protocol.ranges import check_whole
from tessellar.randomness import derive, uniforms
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner

PRECISIONS = ("float32", "bf16")
MAX_IMAGES = 10_000_000
Batches = Iterator[tuple[list[int], Tensor]]
LABELS = 0x1A  # sets the drawing of labels apart from other uses of a seed
SEEDS = 1 << 63  # above it no generator of random numbers takes them


def check_seed(seed: int, count: int = 1) -> None:
    """Raise UserError unless `count` images can have seeds from `seed` on."""
    check_whole("seed", seed, least=0, most=SEEDS - count)


class ImageModel(Protocol):
    """What samples images; `tessellar.pipeline.ImageGenerator` is one."""

    conditioner: Conditioner

    def class_condition(self, labels: Sequence[int]) -> Condition: ...

    def sample_tokens(
        self,
        condition: Condition,
        sampling: Sampling,
        seeds: Sequence[int],
        recorder: Recorder | None = None,
    ) -> Tensor: ...

    def decode(self, tokens: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def balanced_labels(count: int, classes: int | Sequence[int]) -> list[int]:
    """`count` labels that go round the classes (0 .. classes - 1, or those named), so that any
    prefix is balanced.
    """
    names = range(classes) if isinstance(classes, int) else classes
    if not len(names):
        raise UserError("no classes to sample from")
    return [names[i % len(names)] for i in range(count)]


def proportional_labels(count: int, counts: Sequence[int]) -> list[int]:
    """`count` labels of classes in the proportions of `counts`, so mixed that any prefix has nearly
    these proportions.
    """
    shares = np.asarray(counts, dtype=np.float64)
    if shares.sum() <= 0:
        raise UserError("no classes to sample from")
    shares = shares / shares.sum()
    owed = np.zeros(len(shares))
    labels = []
    for _ in range(count):
        owed += shares
        label = int(owed.argmax())
        owed[label] -= 1
        labels.append(label)
    return labels


def random_labels(count: int, classes: int, seed: int) -> list[int]:
    """`count` labels drawn uniformly, as LlamaGen's evaluation does; label i depends on `seed` and i
    alone.
    """
    if classes < 1:
        raise UserError("no classes to sample from")
    draws = uniforms(derive(seed, LABELS), range(count), 1)[:, 0]
    return (draws * classes).astype(np.int64).tolist()


@dataclass(frozen=True)
class Drawing:
    """How a set of images is drawn: image i with seed `seed + i`, in batches (indices, uint8 images
    [b, 3, H, W] on the CPU).

    `indices` (default: all) are the images to make: a process makes every world-th. A `recorder`
    counts evaluations. Raises UserError, before anything is drawn, for a batch size below 1 and an
    unknown precision.
    """

    sampling: Sampling
    seed: int = 0
    batch_size: int = 64
    precision: str = "float32"
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        check_whole("batch size", self.batch_size, least=1, most=MAX_IMAGES)
        if self.precision not in PRECISIONS:
            there = ", ".join(PRECISIONS)
            raise UserError(f"precision {self.precision!r} does not exist; there are {there}")

    def batches(
        self,
        model: ImageModel,
        labels: Sequence[int],
        indices: Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
    ) -> Batches:
        """Image i of `texts[i]`, or without texts of class `labels[i]`."""
        if texts is None:
            return self.of_classes(model, labels, indices)
        return self.of_texts(model, texts, indices)

    def facts(self) -> dict[str, Any]:
        """What the record of the samples says besides the sampling settings."""
        return {}

    def finish(self) -> None:
        """Nothing is to be done when all images are written."""

    def of_classes(
        self, model: ImageModel, labels: Sequence[int], indices: Sequence[int] | None = None
    ) -> Batches:
        """Image i of class `labels[i]`; raises UserError for unknown ones."""
        todo = self._checked(range(len(labels)) if indices is None else indices)
        condition = model.class_condition(labels)
        return self._batches(model, lambda rows: condition.select(torch.tensor(rows)), todo)

    def of_texts(
        self, model: ImageModel, texts: Sequence[str], indices: Sequence[int] | None = None
    ) -> Batches:
        """Image i of `texts[i]`; texts are read batch by batch, since their features are large.

        Raises UserError for a generator that is not conditioned on text.
        """
        conditioner = model.conditioner
        if not isinstance(conditioner, TextConditioner):
            raise UserError(
                "this generator is conditioned on class ids, not on text: give --classes"
            )
        todo = self._checked(range(len(texts)) if indices is None else indices)
        return self._batches(
            model, lambda rows: conditioner.of_texts([texts[i] for i in rows]), todo
        )

    def _checked(self, indices: Sequence[int]) -> Sequence[int]:
        check_seed(self.seed, max(indices, default=0) + 1)
        return indices

    def _batches(
        self,
        model: ImageModel,
        condition_of: Callable[[list[int]], Condition],
        indices: Sequence[int],
    ) -> Batches:
        with ExitStack() as for_all:
            if hasattr(model, "generator"):
                # Weights are packed once, in the precision of all batches.
                with rounding(model, self.precision):
                    for_all.enter_context(model.prepared_for(self.sampling))  # type: ignore[attr-defined]
            for start in range(0, len(indices), self.batch_size):
                chosen = list(indices[start : start + self.batch_size])
                condition = condition_of(chosen)
                seeds = [self.seed + i for i in chosen]
                drawn = draw(
                    model,
                    condition,
                    self.sampling,
                    seeds,
                    precision=self.precision,
                    recorder=self.recorder,
                )
                yield chosen, drawn.images


def rounding(model: ImageModel, precision: str) -> AbstractContextManager:
    """For the generator alone: the tokenizer decodes in float32, as LlamaGen's scripts do."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


class Drawn(NamedTuple):
    """One batch: tokens [B, N, ...] on the model's device, uint8 images [B, 3, H, W] on the CPU."""

    tokens: Tensor
    images: Tensor


@torch.no_grad()
def draw(
    model: ImageModel,
    condition: Condition,
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    precision: str = "float32",
    recorder: Recorder | None = None,
) -> Drawn:
    """One batch: the image of row b of `condition` by `seeds[b]`.

    Raises UserError for settings that the generator does not take, and images that are none.
    """
    with rounding(model, precision):
        tokens = model.sample_tokens(condition, sampling, seeds, recorder)
    return Drawn(tokens, as_uint8(model.decode(tokens)))


def as_uint8(images: Tensor) -> Tensor:
    """What a model made, on the CPU; raises UserError for values that no picture has."""
    if not bool(torch.isfinite(images).all()):
        raise UserError(
            "the model made images with values that are not finite: its weights or the settings of "
            "sampling are out of range"
        )
    return to_uint8(images).cpu()
