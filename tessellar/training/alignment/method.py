"""What a method of alignment is: losses of a batch, for a generator and its tokenizer.

A method says itself which parameters it trains, of what averages are kept and whether it needs a
frozen copy of the generator as it began; the training module only adds up, steps and exports.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.sampling.settings import Sampling
from tessellar.training.alignment.rewards import Reward


class Batch(NamedTuple):
    """Tokens [B, N, ...] of the real images with their condition, what else the data says (`image`,
    `label`, `caption`), and how far the run is, in [0, 1]: which `part` of which `update`.
    """

    tokens: Tensor
    condition: Condition
    data: Mapping[str, Any]
    progress: float
    update: int = 0
    part: int = 0

    @property
    def images(self) -> Tensor:
        """The real images; raises UserError for a cache of tokens."""
        if "image" not in self.data:
            raise UserError(
                "this method compares with real images; the data gives cached tokens alone"
            )
        return self.data["image"]


class Terms(NamedTuple):
    """Named losses, already weighed, whose sum is minimised, and what else is logged."""

    losses: dict[str, Tensor]
    logged: dict[str, Tensor]


class AlignmentMethod(nn.Module, ABC):
    """Losses by which a generator that is already trained is aligned."""

    #: Name of the part that is trained and averaged.
    trained: str = "generator"
    #: How whole images are drawn, where a reward asks for some.
    sampling: Sampling = Sampling()

    def __init__(self) -> None:
        super().__init__()
        # A frozen copy of the generator as it began, where the method compares with it.
        self.reference: Generator | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether `attach` keeps that copy; checkpoints hold it, exports do not."""
        return False

    @property
    def rewards(self) -> Sequence[Reward]:
        """The rewards that it asks."""
        return ()

    def attach(self, model: ImageGenerator) -> None:
        """Take the model that is to be aligned: freeze what is not trained, copy the reference.

        Raises UserError for a generator or a tokenizer that the method cannot work with.
        """
        require_scores(model.generator)
        trained = self.parameters_of(model)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.needs_reference:
            self.reference = deepcopy(model.generator).eval().requires_grad_(False)

    def parameters_of(self, model: ImageGenerator) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in model.generator.parameters() if p.requires_grad]

    @abstractmethod
    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        """Losses of one batch."""

    def kept(self) -> dict[str, Any]:
        """What this process's later batches need of earlier ones, for checkpoints: tensors and plain
        data.
        """
        return {}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Inverse of `kept`."""


def require_scores(generator: Generator) -> None:
    """Raise UserError for a generator that does not score all tokens of an image in one pass."""
    if not hasattr(generator, "score"):
        raise UserError(
            f"{type(generator).__name__} has no likelihood of whole images in one pass, which alignment "
            "needs: take a generator trained by teacher forcing, such as LlamaGen"
        )


def score(
    generator: Generator, tokens: Tensor, condition: Condition, entities: Entities | None = None
) -> Distribution:
    """Teacher-forced scores of all tokens, in generation order."""
    require_scores(generator)
    return generator.score(tokens, condition, entities or generator.entities)  # type: ignore[operator]


def ungenerated(values: Tensor, entities: Entities) -> Tensor:
    """Values [B, N, ...] in generation order, back at their places of the layout."""
    places = entities.inverse.expand(len(values), -1).to(values.device)
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, places]


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the module is in training mode or not; afterwards as it was."""
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)


def decoded(model: ImageGenerator, tokens: Tensor, at_once: int) -> Tensor:
    """Images of tokens [R, N, ...] in float32, `at_once` of them at a time; gradients pass."""
    parts = []
    with torch.autocast(tokens.device.type, enabled=False):
        for part in tokens.split(at_once):
            parts.append(model.tokenizer.decode(part))
    return torch.cat(parts)
