import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tessellar.randomness import derive, uniforms


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_row_depends_on_seed_and_index_only(seed: int, indices: list[int]):
    together = uniforms(seed, indices, 3)
    assert ((together >= 0) & (together < 1)).all()
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(uniforms(seed, [index], 3)[0], row)
        assert np.array_equal(uniforms(seed, [index], 2)[0], row[:2])


def test_numbers_are_uniform_and_unrelated():
    u = uniforms(0, range(20_000), 4)
    counts = np.stack([np.histogram(column, bins=10, range=(0, 1))[0] for column in u.T])
    assert abs(counts - 2000).max() < 200
    neighbours = np.concatenate([u[:-1], u[1:], uniforms(1, range(19_999), 4)], axis=1)
    assert abs(np.corrcoef(neighbours.T) - np.eye(12)).max() < 0.04


def test_seeds_of_different_tuples_differ():
    parts = [(a, b) for a in range(-5, 30) for b in range(30)] + [(a,) for a in range(30)]
    seeds = {derive(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
