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

HOLISTIC = Layout(
    (Segment((4,), Categorical(8), "holistic"), Segment((2, 3), Categorical(5), "grid"))
)


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


WRONG_TOKENS = {
    "a factor outside its vocabulary": (
        Factorized((64,) * 16),
        torch.full((1, 2, 16), 999),
        "999, outside",
    ),
    "a factor outside the vocabulary of its place": (
        Factorized((9, 3)),
        torch.full((1, 2, 2), 5),
        "5, outside",
    ),
    "a factor below 0": (Factorized((9, 3)), torch.full((1, 2, 2), -1), "-1, outside"),
    "bits that are none": (Bits(3), torch.full((1, 2, 3), 2), "2, outside"),
    "an id below 0": (Categorical(4), torch.full((1, 2), -1), "-1, outside"),
    "ids that are real numbers": (Categorical(4), torch.zeros(1, 2), "needs integers"),
    "factors that are real numbers": (Factorized((4, 4)), torch.zeros(1, 2, 2), "needs integers"),
    "bits that are real numbers": (Bits(3), torch.zeros(1, 2, 3), "needs integers"),
    "vectors of integers": (
        Continuous(3),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        "needs real numbers",
    ),
    "vectors with a NaN": (Continuous(3), torch.full((1, 2, 3), torch.nan), "not finite"),
    "vectors with an infinity": (Continuous(3), torch.full((1, 2, 3), -torch.inf), "not finite"),
}


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_every_kind_checks_range_and_type(name: str) -> None:
    kind, tokens, message = WRONG_TOKENS[name]
    with pytest.raises(ValueError, match=message):
        sequence_layout(2, kind).check(tokens)


def test_kinds_that_fit_are_taken() -> None:
    sequence_layout(2, Factorized((9, 3))).check(
        torch.tensor([[[8, 2], [0, 0]]], dtype=torch.int32)
    )
    sequence_layout(2, Bits(3)).check(torch.ones(1, 2, 3, dtype=torch.uint8))
    sequence_layout(2, Continuous(3)).check(torch.randn(1, 2, 3, dtype=torch.bfloat16))


def test_a_layout_holds_ids_or_vectors_but_not_both() -> None:
    with pytest.raises(ValueError, match="cannot share"):
        Layout((Segment((2,), Bits(3)), Segment((2,), Continuous(3))))


def test_first_positions_are_a_layout_where_they_can_be_decoded_alone() -> None:
    line = sequence_layout(6, Continuous(3), min_prefix=2)
    assert line.first(6) is line
    assert line.first(2) == sequence_layout(2, Continuous(3), min_prefix=2)
    mixed = Layout(HOLISTIC.segments, min_prefix=3)
    assert mixed.first(7).segments == (HOLISTIC.segments[0], Segment((3,), Categorical(5), "grid"))
    assert mixed.first(3).segments == (Segment((3,), Categorical(8), "holistic"),)
    for layout, count in ((line, 1), (line, 7), (HOLISTIC, 4)):
        with pytest.raises(
            ValueError, match=f"the first {count} positions of .* cannot be decoded"
        ):
            layout.first(count)
    assert line.starts_with(line) and line.starts_with(line.first(3))
    assert not line.starts_with(sequence_layout(3, Continuous(3)))
    assert not HOLISTIC.starts_with(mixed.first(3)) and not line.first(3).starts_with(line)
