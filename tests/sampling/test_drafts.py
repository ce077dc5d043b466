"""Initial drafts: where they copy from on grids, sequences and segments, and which law they are judged by."""

import pytest
import torch
from torch import Tensor

from tessellar.protocol.entities import ordered, token_order
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout
from tessellar.sampling.drafts import SCHEMES, Neighbourhood, fill, sources

GRID = grid_layout(3, 4, Categorical(5))
MIXED = Layout((Segment((3,), Categorical(9)), Segment((2, 2), Categorical(5))))


def copied(scheme: str, layout: Layout, ranks: list[int], last: int) -> list[int]:
    hood = Neighbourhood.of(layout)
    return sources(scheme, hood, token_order(layout), torch.tensor([ranks]), torch.tensor([last]))[
        0
    ].tolist()


def test_left_and_up_on_a_grid() -> None:
    assert copied("repeat-left", GRID, [5, 6, 7, 8, 9], 4) == [
        4,
        4,
        4,
        -1,
        4,
    ]  # unknown sources: the last known token
    assert copied("repeat-up", GRID, [3, 4, 5, 9], 2) == [-1, 0, 1, 2]
    assert copied("random", GRID, [5, 6], 4) == [-1, -1]
    assert copied("repeat-left", GRID, [0, 1], -1) == [-1, -1]


def test_a_sequence_is_one_row_and_segments_do_not_mix() -> None:
    assert copied("repeat-left", sequence_layout(6, Categorical(5)), [4, 5], 3) == [3, 3]
    assert copied("repeat-up", sequence_layout(6, Categorical(5)), [4, 5], 3) == [-1, -1]
    assert copied("repeat-left", MIXED, [2, 3, 4], 1) == [
        1,
        -1,
        -1,
    ]  # the last known has another vocabulary


def test_an_order_decides_what_is_known() -> None:
    """Generated from the last place to the first: the left neighbour is never known in time, the last known one is."""
    backwards, hood = ordered(list(range(11, -1, -1)), (1,) * 12), Neighbourhood.of(GRID)
    found = sources("repeat-left", hood, backwards, torch.tensor([[2, 3]]), torch.tensor([1]))
    assert found.tolist() == [
        [10, -1]
    ]  # ranks 2 and 3 are places 9 and 8; 8 is in the first column


def test_ranks_past_the_end_do_no_harm() -> None:
    assert len(copied("repeat-up", GRID, [10, 11, 12, 40], 9)) == 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_drafts_and_their_laws(scheme: str) -> None:
    known = torch.tensor([[4, 2, 0, 0, 0, 0]])
    law = torch.tensor([[0.1, 0.0, 0.2, 0.7, 0.0]])
    source, vocab = torch.tensor([[1, -1]]), torch.tensor([[5, 5]])
    exponential = torch.ones(1, 2, 5)
    exponential[0, 0, 2] = 1e-6
    filled = fill(scheme, source, known, vocab, law, torch.tensor([[0.95, 0.25]]), exponential)
    expected = {
        "random": 4,
        "uniform": 4,
        "repeat-left": 2,
        "repeat-up": 2,
        "argmax-left": 3,
        "sample-left": 2,
    }
    first = 4 if scheme in ("random", "uniform") else expected[scheme]
    if scheme in ("random", "uniform"):
        filled = fill(
            scheme,
            torch.full_like(source, -1),
            known,
            vocab,
            law,
            torch.tensor([[0.95, 0.25]]),
            exponential,
        )
    assert filled.tokens.tolist() == [[first, 1]]
    one_hot = torch.eye(5)[filled.tokens[0]]
    assert torch.equal(
        filled.law[0, 1], torch.full((5,), 0.2) if scheme == "uniform" else one_hot[1]
    )
    laws: dict[str, Tensor] = {"uniform": torch.full((5,), 0.2), "sample-left": law[0]}
    assert torch.equal(filled.law[0, 0], laws.get(scheme, one_hot[0]))


def test_uniform_drafts_stay_in_the_vocabulary_of_their_place() -> None:
    uniform = torch.tensor([[0.999, 0.999]])
    vocab = torch.tensor([[9, 5]])
    filled = fill(
        "uniform",
        torch.full((1, 2), -1),
        torch.zeros(1, 7).long(),
        vocab,
        torch.ones(1, 9),
        uniform,
        uniform,
    )
    assert filled.tokens.tolist() == [[8, 4]]
    torch.testing.assert_close(filled.law.sum(-1), torch.ones(1, 2))
    assert not bool(filled.law[0, 1, 5:].any())
