"""Entities are a partition: reading and writing by entity touches each token once; the end is safe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessellar.protocol.entities import Entities, ordered


@st.composite
def partitions(draw: st.DrawFn) -> Entities:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    order = draw(st.permutations(range(sum(sizes))))
    return ordered(order, sizes)


@given(partitions())
def test_put_then_get_restores_every_token_once(entities: Entities) -> None:
    tokens, blank = torch.arange(entities.length)[None], torch.full((1, entities.length), -1)
    for n in range(entities.count):
        first = torch.tensor([n])
        values = entities.get(tokens, first, 1)
        assert values.shape[1] == entities.sizes[n]
        assert bool((entities.get(blank, first, 1) == -1).all())
        blank = entities.put(blank, first, 1, values)
    assert torch.equal(blank, tokens)


@given(partitions())
def test_mask_is_block_causal(entities: Entities) -> None:
    number = entities.entity_of(torch.tensor([0]), entities.count)[0]
    assert torch.equal(entities.mask(), number[:, None] >= number[None, :])


def test_past_the_end_is_numbered_but_never_written() -> None:
    entities = ordered([0, 1, 2, 3], [2, 2])
    first = torch.tensor([1])
    assert entities.entity_of(first, 3).tolist() == [[1, 1, 2, 2, 3, 3]]
    assert entities.indices(first, 2).tolist() == [[2, 3, 3, 3]]
    out = entities.put(torch.zeros(1, 4, dtype=torch.int64), first, 2, torch.tensor([[5, 6, 7, 8]]))
    assert out.tolist() == [[0, 0, 5, 6]]


def test_put_respects_keep_and_does_not_change_its_input() -> None:
    entities, tokens = ordered([2, 0, 1], [1, 1, 1]), torch.zeros(2, 3, dtype=torch.int64)
    keep = torch.tensor([[True, False], [False, True]])
    out = entities.put(tokens, torch.tensor([0, 1]), 2, torch.tensor([[1, 2], [3, 4]]), keep)
    assert out.tolist() == [[0, 0, 1], [0, 4, 0]] and not tokens.any()


def test_rows_out_of_step_are_refused() -> None:
    with pytest.raises(ValueError, match="in step"):
        ordered([0, 1, 2], [1, 2]).steps(torch.tensor([0, 1]), 1)


@pytest.mark.parametrize("order, sizes", [([0, 0, 1], [3]), ([0, 1, 2], [2]), ([0, 1, 2], [3, 0])])
def test_not_a_partition(order: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError):
        ordered(order, sizes)
