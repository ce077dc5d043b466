"""A state may hold a part of a tokenizer that rolls back and forks with it; windows of places are refused by name."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, sequence_layout
from tests.models.test_protocol import labels, make


class Counts:
    """A toy part: how many entities of each image it has read."""

    def __init__(self, read: Tensor) -> None:
        self.read = read

    def rollback(self, fed: Tensor) -> None:
        self.read = torch.minimum(self.read, fed)

    def select(self, index: Tensor) -> "Counts":
        return Counts(self.read[index].clone())


def test_a_part_is_rolled_back_and_forked_with_the_state() -> None:
    state = TableGenerator(sequence_layout(3, Categorical(2))).start(
        Condition(ids=torch.tensor([0, 1]))
    )
    state.part = Counts(torch.tensor([3, 3]))
    forked = state.select(torch.tensor([1, 0, 1]))
    state.rollback(torch.tensor([1, 2]))
    assert (
        isinstance(state.part, Counts) and state.part.read.tolist() == [1, 2] == state.fed.tolist()
    )
    assert isinstance(forked.part, Counts) and forked.part.read.tolist() == [3, 3, 3]
    forked.rollback(torch.tensor([0, 1, 2]))
    assert forked.part.read.tolist() == [0, 1, 2] and state.part.read.tolist() == [1, 2]


def test_a_window_of_places_is_refused_by_name() -> None:
    generator = make("var")
    state = generator.start(labels(1))
    with pytest.raises(UserError, match="VAR predicts runs of entities"):
        generator.predict_places(
            state, torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 2]])
        )
