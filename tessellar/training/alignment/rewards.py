"""Rewards: what drawn images are worth. Each is a class that a YAML chooses; more of them have
advantages of their own, weighed against each other.

Shapes: R images drawn, in groups of G of one condition, rows of a group together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.unsaved import Unsaved
from tessellar.networks.classifier import Classifier
from tessellar.networks.clip import Clip
from tessellar.protocol.arguments import in_ranges


class Drawn(NamedTuple):
    """Images [R, 3, H, W] as decoded (about [-1, 1]), the real ones that they were drawn for, or
    None, and what else the batch says of each row (`label` [R], `caption` R texts).
    """

    images: Tensor
    originals: Tensor | None
    batch: Mapping[str, Any]


def repeated(batch: Mapping[str, Any], group: int) -> dict[str, Any]:
    """A batch with every sample `group` times, one after the other."""
    rows: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            rows[name] = value.repeat_interleave(group, 0)
        else:
            rows[name] = [item for item in value for _ in range(group)]
    return rows


class Material(NamedTuple):
    """What a reward may look at before a run: batches of about so many real training images, and of
    the generator's own; names of the classes, empty where they are not known.
    """

    class_names: tuple[str, ...]
    real: Callable[[int], Iterator[Tensor]]
    own: Callable[[int], Iterator[Tensor]]


class Reward(nn.Module, ABC):
    """Gives each image a number; `weight` is that of its advantages among those of other rewards."""

    #: Whether it asks for the real images behind the samples.
    reads_originals: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, drawn: Drawn) -> Tensor:
        """[R]; more is better."""

    @property
    def files(self) -> list[Path]:
        """Files of the networks that it asks, which the run may not be measured with."""
        return []

    def prepare(self, material: Material) -> None:
        """What it needs to know before the first update; a checkpoint brings it along."""


@in_ranges
class ReconstructionReward(Reward):
    """Minus the distance to the real image: pixels (mean over channels and places) and, where one is
    given, a perceptual distance (VA-pi, arXiv 2512.19680).
    """

    reads_originals = True

    def __init__(
        self,
        pixels: float = 1.0,
        kind: Literal["l1", "l2"] = "l2",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.pixels = pixels
        self.kind = kind
        self.perceptual = None if perceptual is None else Unsaved(perceptual)
        self.perceptual_weight = perceptual_weight

    def pixel_error(self, drawn: Drawn) -> Tensor:
        """Mean absolute or squared difference [R], not weighed."""
        assert drawn.originals is not None
        error = at_least_float32(drawn.images) - at_least_float32(drawn.originals)
        each = error.abs() if self.kind == "l1" else error.square()
        return each.flatten(1).mean(1)

    def forward(self, drawn: Drawn) -> Tensor:
        loss = self.pixels * self.pixel_error(drawn)
        if self.perceptual is not None:
            distance = self.perceptual(drawn.originals, drawn.images)
            loss = loss + self.perceptual_weight * distance.flatten()
        return -loss


@in_ranges
class ClassifierReward(Reward):
    """Log-probability of the image's class under a classifier, or with `match` 1 where that is its
    first choice.

    `weights` is a file that `evaluate.py extractor --purpose teacher` wrote. Raises UserError where
    the data has no labels.
    """

    def __init__(self, weights: str, match: bool = False, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.network = Unsaved(Classifier(weights))
        self.match = match
        self.places: list[int] = []  # the network's number of each class, where names are known

    @property
    def files(self) -> list[Path]:
        return [self.network.module.file]

    def prepare(self, material: Material) -> None:
        """Find the network's classes by the names of the data's."""
        classifier = self.network.module
        names = material.class_names
        self.places = [classifier.class_of(label, name) for label, name in enumerate(names)]

    def forward(self, drawn: Drawn) -> Tensor:
        if "label" not in drawn.batch:
            raise UserError("ClassifierReward needs the classes of the images; this data has none")
        labels = drawn.batch["label"]
        if self.places:
            labels = torch.tensor(self.places, device=labels.device)[labels]
        logits = self.network(drawn.images)
        if self.match:
            return (logits.argmax(-1) == labels).float()
        return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@in_ranges
class CLIPScore(Reward):
    """2.5 x the cosine between image and caption, at least 0 (arXiv 2104.08718).

    `clip` is a local folder or a hub id. Raises UserError where the data has no captions.
    """

    def __init__(self, clip: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.clip = Unsaved(Clip(clip))

    def forward(self, drawn: Drawn) -> Tensor:
        if "caption" not in drawn.batch:
            raise UserError("CLIPScore needs captions; this data has none")
        return self.clip(drawn.images, drawn.batch["caption"])
