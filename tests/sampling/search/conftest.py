"""A table generator, a tokenizer whose images show their tokens, and tasks for searches over them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, Layout, sequence_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.sampling.search.searching import Task
from tessellar.sampling.search.verifiers import Candidates, Subject, Verifier
from tessellar.sampling.settings import Sampling

CODES = 3
LENGTH = 6


class Bars(Tokenizer):
    """Images [B, 3, 1, N]: bar i is the token at place i, 9 where there is none. Remembers its seeds."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.image_size = (1, layout.length)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seeds: list[list[int]] = []

    def encode(self, images: Tensor) -> Tensor:
        return images[:, 0, 0].long()

    def decode(self, tokens: Tensor) -> Tensor:
        images = torch.full((len(tokens), 3, 1, self.layout.length), 9.0)
        images[..., : tokens.shape[1]] = tokens[:, None, None].float()
        return images

    def decode_seeded(self, tokens: Tensor, seeds) -> Tensor:
        self.seeds.append(list(seeds))
        return self.decode(tokens)

    def forward(self, images: Tensor) -> TokenizerOutput:
        return TokenizerOutput(images, self.encode(images), {})

    @property
    def last_layer(self) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class Liking(Verifier):
    """A fixed taste: images are scored by weights of their bars; candidates that were scored are counted."""

    counted: list[int]
    fails_at: int | None = None

    def check(self, subject: Subject) -> None:
        pass

    def measure(self, candidates: Candidates) -> Tensor:
        images = candidates.images
        assert images is not None
        self.counted.append(len(images))
        if self.fails_at is not None and sum(self.counted) > self.fails_at:
            raise KeyboardInterrupt
        weights = torch.sin(torch.arange(1.0, images.shape[-1] + 1) * 2.3)
        return (torch.cos(images[:, 0, 0] * 1.7) * weights).sum(1, keepdim=True)


@pytest.fixture
def liking() -> Callable[..., Liking]:
    return lambda fails_at=None: Liking([], fails_at)


@pytest.fixture
def task() -> Callable[..., Task]:
    """A task of a table; the seed is the image's."""

    def make(
        seed: int = 5,
        layout: Layout | None = None,
        entity_size: int = 1,
        sampling: Sampling | None = None,
    ) -> Task:
        layout = layout or sequence_layout(LENGTH, Categorical(CODES), min_prefix=1)
        return Task(
            generator=TableGenerator(layout, entity_size=entity_size),
            tokenizer=Bars(layout),
            condition=Condition(ids=torch.tensor([1])),
            sampling=sampling or Sampling(),
            seed=seed,
            subject=Subject(label=1),
        )

    return make
