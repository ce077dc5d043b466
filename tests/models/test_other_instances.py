"""Importers read sizes and options from weights: generators unlike the recorded ones go out and come back the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.retok import ReToKGPT
from tessellar.models.retok import official as retok
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Bits, Factorized, Layout
from tests.tiny.other_generators import CASES, CLASSES, SEQUENCE, Pair


def tokens_of(layout: Layout) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    if isinstance(layout.segments[0].kind, (Bits, Factorized)):
        return torch.randint(0, 2, layout.blank(2).shape, generator=draw)
    if not layout.is_categorical:
        return torch.randn(layout.blank(2).shape, generator=draw)
    return (torch.rand(2, layout.length, generator=draw) * layout.vocab()).long()


def losses(generator: Generator, condition: Condition) -> dict[str, Tensor]:
    """Where training draws noise, it is the same for both."""
    torch.manual_seed(0)
    with torch.no_grad():
        return generator.loss(tokens_of(generator.layout), condition)


@pytest.mark.parametrize(("make", "condition"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_an_instance_unlike_the_recorded_one_comes_back_the_same(
    make: Callable[[], Pair], condition: Condition
) -> None:
    made, again = make()
    assert make.__name__.startswith(type(made).__module__.split(".")[2])
    ours = dict(made.state_dict())
    theirs = again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
    expected = losses(made, condition)
    found = losses(again, condition)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=0, atol=0)


def test_every_importer_of_a_generator_has_another_instance() -> None:
    papers = [path.parent.name for path in Path(retok.__file__).parents[1].glob("*/official.py")]
    assert len(papers) > 15
    names = [make.__name__ for make, _ in CASES]
    names.append("mingtok_")  # of which a head alone is published: tests/models/test_mingtok.py
    assert [paper for paper in papers if not any(n.startswith(f"{paper}_") for n in names)] == []


def test_feed_forward_layers_that_no_option_here_gives_are_refused_by_name() -> None:
    made = ReToKGPT(SEQUENCE, 24, 1, 3, CLASSES, ffn_multiple_of=20)
    state = retok.gpt_to_official(made)
    for name in ("w1", "w3"):
        state[f"layers.0.feed_forward.{name}.weight"] = torch.zeros(30, 24)
    state["layers.0.feed_forward.w2.weight"] = torch.zeros(24, 30)
    with pytest.raises(UserError, match="ffn_dim_multiplier below 1 is not supported"):
        retok.gpt_from_official(state, SEQUENCE, 3)
