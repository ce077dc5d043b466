"""States whose lengths and positions lie on a device: the same predictions, and the host waits for nothing."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.layout import Categorical, grid_layout
from tests.models.test_protocol import GENERATORS, GUIDANCES, labels, make, tokens_of

FIXED = ("llamagen", "llamagen-1d", "hita", "retok", "rar", "flextok-ar", "token-shuffle")
UNEQUAL = ("har", "var", "xar-cell", "next-cell")


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("guidance", GUIDANCES)
@torch.no_grad()
def test_a_fixed_state_predicts_the_same(name: str, guidance: str) -> None:
    """Also behind a roll-back, and where images stand at unequal entities."""
    generator = make(name)
    tokens = tokens_of(generator.layout, 2)
    plain = generator.start(labels(2), GUIDANCES[guidance], window=2)
    fixed = generator.start(labels(2), GUIDANCES[guidance], window=2).fixed("cpu")
    for count, back in ((1, [1, 1]), (2, [3, 1]), (1, [2, 2]), (2, [4, 4])):
        expected = generator.predict(plain, tokens, count, count)
        found = generator.predict(fixed, tokens, count, count)
        assert isinstance(expected, Logits) and isinstance(found, Logits)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        plain.rollback(torch.tensor(back))
        fixed.rollback(torch.tensor(back))


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_no_value_is_read_on_the_host(name: str) -> None:
    """On the meta device there are no values: whoever reads one fails."""
    generator = make(name).to("meta")
    tokens = tokens_of(generator.layout, 2).to("meta")
    state = make(name).start(labels(2), GUIDANCES["guided"])
    assert state.prefix is not None and state.cache is not None
    state.condition = state.condition.to("meta")
    state.prefix = type(state.prefix)(state.prefix.embeddings.to("meta"), state.prefix.valid)
    state.cache.data = state.cache.data.to("meta")  # type: ignore[union-attr]
    state = state.fixed("meta")
    places = state.places(1)
    assert places.device.type == "meta" and state.fed.device.type == "meta"
    found = generator.predict(state, tokens)
    assert isinstance(found, Logits) and found.logits.device.type == "meta"
    first = torch.zeros(2, dtype=torch.int64, device="meta")
    drawn = state.entities.get(tokens, first, 1)
    assert state.entities.put(tokens, first, 1, drawn).shape == tokens.shape


@pytest.mark.parametrize("name", UNEQUAL)
def test_inputs_of_unequal_length_are_refused_in_one_line(name: str) -> None:
    assert name in GENERATORS
    with pytest.raises(UserError, match="give steps of unequal shapes"):
        make(name).start(labels(1)).fixed("cpu")


def test_entities_answer_where_their_numbers_lie() -> None:
    for entities in (
        token_order(grid_layout(2, 3, Categorical(4))),
        Entities(torch.randperm(6), (2, 2, 2)),
    ):
        there = entities.to("meta")
        first = torch.zeros(2, dtype=torch.int64, device="meta")
        assert there.indices(first, 2).device.type == "meta"
        assert (
            there.entity_of(first, 2).shape
            == entities.entity_of(torch.zeros(2, dtype=torch.int64), 2).shape
        )
