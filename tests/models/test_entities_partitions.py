"""Every X on every small grid: a partition of the right tokens, its inverse, its masks, and X written as a flag."""

from itertools import product

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from tessellar.errors import UserError
from tessellar.layers.kv_cache import flex_mask
from tessellar.protocol.entities import (
    Entities,
    cells,
    image_entity,
    levels,
    parse_entities,
    random_order,
    scales,
    shuffled,
    subsamples,
    take,
    token_order,
)
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout

SIDES = range(1, 7)
GRIDS = list(product(SIDES, SIDES))


def grid(h: int, w: int) -> Layout:
    return grid_layout(h, w, Categorical(2))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def members(entities: Entities) -> list[list[int]]:
    return [part.tolist() for part in entities.order.split(entities.sizes)]


def check(entities: Entities) -> None:
    """A partition whose inverse restores the layout's order, and masks that say the same."""
    n = entities.length
    assert sorted(entities.order.tolist()) == list(range(n)) and sum(entities.sizes) == n
    tokens = torch.arange(n)[None]
    assert torch.equal(take(take(tokens, entities.order[None]), entities.inverse[None]), tokens)
    numbers = [number for number, size in enumerate(entities.sizes) for _ in range(size)]
    expected = [[j <= i for j in numbers] for i in numbers]
    assert entities.mask().tolist() == expected and entities.numbers.tolist() == numbers


@pytest.mark.parametrize("h, w", GRIDS)
def test_cells_and_subsamples_of_every_size(h: int, w: int) -> None:
    for a, b in product(divisors(h), divisors(w)):
        cell, spread = cells(grid(h, w), a, b), subsamples(grid(h, w), a, b)
        check(cell)
        check(spread)
        assert members(cell) == [
            [(i * a + k) * w + j * b + m for k in range(a) for m in range(b)]
            for i in range(h // a)
            for j in range(w // b)
        ]
        assert members(spread) == [
            [(i + k * h // a) * w + j + m * w // b for k in range(a) for m in range(b)]
            for i in range(h // a)
            for j in range(w // b)
        ]
    assert members(cells(grid(h, w), h, w)) == members(image_entity(grid(h, w)))
    assert members(cells(grid(h, w), 1, 1)) == members(token_order(grid(h, w)))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 99))
def test_levels_random_orders_and_shuffled_entities(sizes: list[int], seed: int) -> None:
    layout, stream = (
        sequence_layout(sum(sizes), Categorical(2)),
        torch.Generator().manual_seed(seed),
    )
    runs = levels(layout, sizes)
    check(runs)
    assert runs.order.tolist() == list(range(sum(sizes))) and runs.sizes == tuple(sizes)
    mixed = shuffled(runs, stream)
    check(mixed)
    assert sorted(members(mixed)) == sorted(members(runs))
    check(random_order(layout, stream, sizes=sizes))
    several = random_order(layout, stream, batch=3)
    assert several.order.shape == (3, sum(sizes)) and several.sizes == (1,) * sum(sizes)
    assert torch.equal(
        several.order.gather(1, several.inverse), torch.arange(sum(sizes)).expand(3, -1)
    )


def test_segments_are_levels_and_what_grows_is_scales() -> None:
    pyramid = Layout(tuple(Segment((side, side), Categorical(2)) for side in (1, 2, 4)))
    assert scales(pyramid).sizes == levels(pyramid).sizes == (1, 4, 16)
    check(scales(pyramid))
    lines = Layout(tuple(Segment((length,), Categorical(2)) for length in (1, 1, 3)))
    assert scales(lines).sizes == (1, 1, 3)
    for other in (
        grid(4, 4),
        Layout((*pyramid.segments[::-1],)),
        Layout((*lines.segments[::-1],)),
        Layout((*lines.segments, *pyramid.segments)),
        sequence_layout(5, Categorical(2)),
    ):
        with pytest.raises(UserError, match="coarse to fine"):
            scales(other)


@pytest.mark.parametrize("sizes", [(3, 140, 1, 120), (64,) * 4, (1,) * 300, (256,)])
def test_block_mask_is_the_dense_mask(sizes: tuple[int, ...]) -> None:
    """A block of 128 x 128 is stored where any of its pairs is visible, as full where all are."""
    entities = levels(sequence_layout(sum(sizes), Categorical(2)), sizes)
    n = entities.length
    made = flex_mask(tuple(entities.numbers.tolist()), torch.device("cpu"))
    blocks = -(-n // 128)
    dense = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    dense[:n, :n] = entities.mask()
    tiles = rearrange(dense, "(a p) (b q) -> a b (p q)", p=128, q=128)
    assert torch.equal(made.to_dense()[0, 0].bool(), tiles.any(-1))
    index = torch.arange(n)
    assert torch.equal(
        made.mask_mod(index * 0, index * 0, index[:, None], index[None, :]), entities.mask()
    )


@pytest.mark.parametrize(
    "text, same",
    [
        ("token", lambda g: token_order(g)),
        ("image", lambda g: image_entity(g)),
        ("cell:2", lambda g: cells(g, 2, 2)),
        ("window:2", lambda g: cells(g, 2, 2)),
        ("cell:2x3", lambda g: cells(g, 2, 3)),
        ("subsample:2", lambda g: subsamples(g, 2)),
        ("subsample:4x3", lambda g: subsamples(g, 4, 3)),
        ("level:1,3,20", lambda g: levels(g, (1, 3, 20))),
        ("level", lambda g: levels(g)),
        ("random:7", lambda g: random_order(g, torch.Generator().manual_seed(7))),
    ],
)
def test_an_entity_as_a_flag(text: str, same) -> None:
    ours, expected = parse_entities(text, grid(4, 6)), same(grid(4, 6))
    assert torch.equal(ours.order, expected.order) and ours.sizes == expected.sizes


@pytest.mark.parametrize(
    "text", ["", "cells", "cell", "cell:2x2x2", "cell:a", "token:2", "random", "scale:1,2"]
)
def test_unknown_entities_are_listed(text: str) -> None:
    with pytest.raises(UserError, match="none of token, image"):
        parse_entities(text, grid(4, 4))


@pytest.mark.parametrize(
    "text, message",
    [
        ("cell:3", "3x3 do not divide the grid of 4x6"),
        ("subsample:4", "do not divide"),
        ("level:1,2", "sum to the 24"),
    ],
)
def test_entities_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_entities(text, grid(4, 6))
    with pytest.raises(UserError, match="one grid"):
        cells(sequence_layout(4, Categorical(2)), 2, 2)


def test_cells_of_a_sequence_are_consecutive() -> None:
    layout = sequence_layout(6, Categorical(2))
    assert members(cells(layout, 1, 2)) == [[0, 1], [2, 3], [4, 5]]
    check(cells(layout, 1, 3))
    with pytest.raises(UserError, match="windows of 4 do not divide the sequence of 6"):
        cells(layout, 1, 4)
