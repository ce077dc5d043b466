"""Random numbers that belong to a sample, not to a process: a hash of (seed, epoch, index), so that
order, workers and ranks change nothing and a batch is drawn in a few array operations.

The hash is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA
2014).
"""

from collections.abc import Sequence

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive(*parts: int) -> int:
    """A seed in [0, 2^63) for a tuple of integers; other tuples give unrelated seeds."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + _STEP + _mix(np.array([part % 2**64], dtype=np.uint64)))
    return int(state[0] >> np.uint64(1))


def uniforms(seed: int, indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample, float64 [B, count]; row b depends on (seed,
    indices[b]) alone.
    """
    keys = _mix(np.asarray(indices, dtype=np.uint64) * _STEP + np.uint64(derive(seed)))
    bits = _mix(keys[:, None] + _STEP * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53
