"""The cache: what is visible, what roll-back forgets, what an uncommitted pass leaves behind."""

import pytest
import torch

from tessellar.layers.kv_cache import NEVER, KVCache, NoCache


def make(rows: int = 2, capacity: int = 8) -> KVCache:
    return KVCache(1, rows, 1, capacity, 2, torch.float32, torch.device("cpu"))


def keys(value: float, rows: int = 2, n: int = 1) -> torch.Tensor:
    return torch.full((rows, 1, n, 2), value)


def test_uncommitted_pass_leaves_no_trace() -> None:
    cache = make()
    cache.write(0, cache.reserve(torch.tensor([[0]])), keys(1.0), keys(1.0))
    k, _ = cache.write(0, cache.reserve(torch.tensor([[0]])), keys(2.0), keys(2.0))
    assert k.shape[2] == 1 and bool((k == 2).all())


def test_rows_of_unequal_length_write_and_see_their_own_slots() -> None:
    cache = make()
    cache.write(0, cache.reserve(torch.arange(3)[None]), keys(1.0, n=3), keys(1.0, n=3))
    cache.commit()
    cache.truncate(torch.tensor([3, 1]))
    slots = cache.reserve(torch.tensor([[3], [1]]))
    k, _ = cache.write(0, slots, keys(9.0), keys(9.0))
    assert slots.index.tolist() == [[3], [1]]
    assert slots.mask is not None and slots.mask[:, 0, 0].tolist() == [
        [True] * 4,
        [True, True, False, False],
    ]
    assert k[0, 0, 3, 0] == 9 and k[1, 0, 1, 0] == 9 and k[1, 0, 2, 0] == 1


def test_padding_is_hidden_but_sees_itself() -> None:
    cache = make(rows=1)
    slots = cache.reserve(torch.tensor([[NEVER, 1, 2]]))
    assert slots.mask is not None
    assert slots.mask[0, 0].tolist()[1:] == [[False, True, False], [False, True, True]]
    assert slots.mask[0, 0, 0, 0]


def test_blocks_of_equal_number_see_each_other() -> None:
    slots = NoCache(torch.device("cpu")).reserve(torch.tensor([[0, 1, 1]]))
    assert slots.mask is not None
    assert slots.mask[0, 0].tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]


def test_overflow_and_growing_are_refused() -> None:
    cache = make(capacity=2)
    with pytest.raises(ValueError, match="holds 2"):
        cache.reserve(torch.arange(3)[None])
    with pytest.raises(ValueError, match="roll back"):
        cache.truncate(torch.tensor([1, 1]))


def test_select_copies() -> None:
    cache = make()
    cache.write(0, cache.reserve(torch.arange(2)[None]), keys(1.0, n=2), keys(1.0, n=2))
    cache.commit()
    fork = cache.select(torch.tensor([1, 1, 0]))
    fork.data.fill_(7)
    assert fork.lengths.tolist() == [2, 2, 2] and bool((cache.data[:, :, :, :, :2] == 1).all())
