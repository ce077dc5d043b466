"""Layouts: derived facts, the checks of tokens, and layouts that make no sense."""

import pytest
import torch

from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)

HOLISTIC = Layout((Segment((4,), Categorical(8), "holistic"), Segment((2, 3), Categorical(5), "grid")))


def test_facts_of_two_segments() -> None:
    assert HOLISTIC.length == 10 and HOLISTIC.starts == (0, 4, 10) and HOLISTIC.grid is None
    assert HOLISTIC.vocab().tolist() == [8] * 4 + [5] * 6
    assert grid_layout(2, 3, Categorical(5)).grid == (2, 3)


@pytest.mark.parametrize(
    "kind, shape, dtype",
    [
        (Categorical(5), (2, 6), torch.int64),
        (Factorized((3, 4)), (2, 6, 2), torch.int64),
        (Bits(7), (2, 6, 7), torch.int64),
        (Continuous(16), (2, 6, 16), torch.float32),
    ],
)
def test_blank_has_the_shape_of_tokens(kind, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = grid_layout(2, 3, kind)
    blank = layout.blank(2)
    assert blank.shape == shape and blank.dtype == dtype
    layout.check(blank)


def test_ids_are_checked_against_their_own_segment() -> None:
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    tokens[0, 3] = 7
    HOLISTIC.check(tokens)
    tokens[0, 4] = 5
    with pytest.raises(ValueError, match="vocabulary"):
        HOLISTIC.check(tokens)


def test_a_prefix_fits_only_where_it_can_be_decoded() -> None:
    short = torch.zeros(1, 3, dtype=torch.int64)
    sequence_layout(8, Categorical(4), min_prefix=2).check(short)
    with pytest.raises(ValueError, match="needs"):
        sequence_layout(8, Categorical(4)).check(short)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Layout(()),
        lambda: Segment((0, 3), Categorical(4)),
        lambda: sequence_layout(4, Categorical(4), min_prefix=5),
        lambda: Layout((Segment((2,), Categorical(4)), Segment((2,), Continuous(4)))),
    ],
)
def test_impossible_layouts(make) -> None:
    with pytest.raises(ValueError):
        make()


def test_only_categorical_layouts_have_a_vocabulary() -> None:
    with pytest.raises(TypeError, match="categorical"):
        grid_layout(2, 2, Bits(4)).vocab()
