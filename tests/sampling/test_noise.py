"""Noise: counted draws that belong to an image."""

import numpy as np
import pytest
import torch
from scipy import stats

from tessellar.protocol.noise import Noise
from tessellar.randomness import derive

DRAWS = ("uniform", "normal", "exponential")
STEP = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """The finaliser as it is published, in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def bits(seed: int, draw: int, place: int) -> int:
    of_draw = splitmix((derive(seed) + STEP * draw) % 2**64)
    return splitmix((of_draw + STEP * place) % 2**64)


def test_numbers_are_a_hash_of_seed_draw_and_place() -> None:
    """So they are the same on every device: what is not integer arithmetic is a product with 2^-24."""
    noise = Noise([3, 2**62 + 1])
    first = noise.uniform(2, 2)
    second = noise.uniform(3)
    for row, seed in enumerate((3, 2**62 + 1)):
        expected = [(bits(seed, 1, place) >> 40) / 2**24 for place in (1, 2, 3, 4)]
        assert first[row].flatten().tolist() == expected
        assert second[row].tolist() == [(bits(seed, 2, place) >> 40) / 2**24 for place in (1, 2, 3)]


@pytest.mark.parametrize("kind", DRAWS)
def test_an_image_draws_the_same_alone_and_in_any_batch(kind: str) -> None:
    together = Noise([5, 6, 7])
    alone = Noise([6])
    for shape in ((4,), (2, 3), ()):
        drawn = getattr(together, kind)(*shape)
        assert torch.equal(drawn[1:2], getattr(alone, kind)(*shape))
        assert not torch.equal(drawn[0], drawn[2])


def after(seeds: list[int], draws: int) -> Noise:
    noise = Noise(seeds)
    for _ in range(draws):
        noise.uniform()
    return noise


def test_selected_streams_go_on_and_are_apart() -> None:
    noise = after([1, 2], 1)
    chosen = noise.select(torch.tensor([1, 1]))
    expected = after([2, 2], 1).normal(3)
    assert torch.equal(chosen.normal(3), expected)
    assert torch.equal(noise.normal(2), after([1, 2], 1).normal(2)), "what it drew is its own"


def test_a_part_moves_on_the_streams_that_it_is_of() -> None:
    noise = after([1, 2, 3], 1)
    part = noise.part(torch.tensor([2, 0]))
    assert torch.equal(part.normal(2), after([3, 1], 1).normal(2))
    inner = part.part(torch.tensor([1]))
    assert torch.equal(inner.normal(2), after([1], 2).normal(2))
    drawn = noise.normal(2)
    for row, (seed, draws) in enumerate(((1, 3), (2, 1), (3, 2))):
        assert torch.equal(drawn[row : row + 1], after([seed], draws).normal(2))


@pytest.mark.parametrize(
    ("kind", "law"), list(zip(DRAWS, ("uniform", "norm", "expon"), strict=True))
)
def test_the_laws(kind: str, law: str) -> None:
    """Kolmogorov and Smirnov, of neighbouring seeds and draws: false alarm 1e-4 each."""
    noise = Noise(range(100))
    values = torch.stack([getattr(noise, kind)(50) for _ in range(20)]).flatten().numpy()
    assert stats.kstest(values, law).pvalue > 1e-4
    correlations = np.corrcoef(values.reshape(20, 100, 50).transpose(1, 0, 2).reshape(100, -1))
    assert abs(correlations - np.eye(100)).max() < 6 / np.sqrt(1000)


def test_exponential_draws_are_positive_and_finite() -> None:
    drawn = Noise([0]).exponential(100_000)
    assert bool((drawn > 0).all()) and bool(drawn.isfinite().all()) and float(drawn.max()) > 8
