"""Statistics for exactness tests: noise for 100,000 images at once, and a chi-square test with pooled cells."""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.noise import Noise

FALSE_ALARM = 1e-6
"""Probability that a correct sampler fails one chi-square test; seeds are fixed, so it either always does or never."""
LEAST_EXPECTED = 8.0


class SharedNoise(Noise):
    """Noise of a whole batch from one stream: many thousand images take one call."""

    def __init__(self, seed: int, batch: int) -> None:
        super().__init__([])
        self.stream, self.batch = torch.Generator().manual_seed(seed), batch

    def __len__(self) -> int:
        return self.batch

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.stream)

    def exponential(self, *shape: int) -> Tensor:
        drawn = -torch.log1p(-self.uniform(*shape))
        return drawn.clamp(min=torch.finfo(torch.float32).tiny)

    def select(self, index: Tensor) -> "SharedNoise":
        """The stream goes on for fewer images."""
        rest = SharedNoise(0, len(index))
        rest.stream = self.stream
        return rest

    part = select


@pytest.fixture
def shared_noise() -> Callable[[int, int], Noise]:
    """Noise of a seed for a batch."""
    return SharedNoise


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """p-value of counts against expectations; cells are pooled, rarest first, until each expects at least 8."""
    cells, pool = [], [0.0, 0.0]
    for wanted, seen in sorted(zip(expected.tolist(), counts.tolist(), strict=True)):
        pool = [pool[0] + wanted, pool[1] + seen]
        if pool[0] >= LEAST_EXPECTED:
            cells.append(pool)
            pool = [0.0, 0.0]
    cells[-1] = [cells[-1][0] + pool[0], cells[-1][1] + pool[1]]
    assert len(cells) > 1, "a test of one cell says nothing"
    return float(
        chi2.sf(sum((seen - wanted) ** 2 / wanted for wanted, seen in cells), len(cells) - 1)
    )


@pytest.fixture
def fits() -> Callable[[Tensor, Tensor], bool]:
    """Whether counts fit a law, at the false-alarm rate above; outcomes of probability 0 must not occur."""

    def test(counts: Tensor, law: Tensor) -> bool:
        possible = law > 0
        if bool((counts[~possible] > 0).any()):
            return False
        return chi_square(counts[possible], law[possible] * counts.sum()) > FALSE_ALARM

    return test


@pytest.fixture
def histogram() -> Callable[[TableGenerator, Tensor], Tensor]:
    """How often each whole image occurs in tokens [B, N], in the order of `TableGenerator.joint`."""

    def count(generator: TableGenerator, tokens: Tensor) -> Tensor:
        weights = generator.codes ** torch.arange(generator.layout.length).flip(0)
        return torch.bincount(
            (tokens * weights).sum(1), minlength=generator.codes**generator.layout.length
        )

    return count
