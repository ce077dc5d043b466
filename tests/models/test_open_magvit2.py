"""Generators of Open-MAGVIT2 and IBQ: published sizes, first losses, which sub-token sees which, scales and
temperatures a sub-token."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.ibq import IBQAR, ibq_ar_b, ibq_ar_l, ibq_ar_xl, ibq_ar_xxl
from tessellar.models.open_magvit2 import (
    OpenMAGVIT2AR,
    open_magvit2_ar_b,
    open_magvit2_ar_l,
    open_magvit2_ar_xl,
)
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import FactorLogits
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, PerSubToken
from tessellar.protocol.layout import Categorical, Factorized, Layout, grid_layout
from tessellar.sampling.settings import Sampling

PUBLISHED = grid_layout(16, 16, Factorized((64, 4096)))
CODES = grid_layout(16, 16, Categorical(16384))
LAYOUT = grid_layout(3, 3, Factorized((5, 7)))
LABELS = Condition(ids=torch.tensor([0, 3]))
GUIDED = Guidance(PerSubToken(1.0, further=(3.0,)))


@pytest.mark.parametrize(
    ("preset", "layout", "count"),
    [
        (open_magvit2_ar_b, PUBLISHED, 343_570_432),
        (open_magvit2_ar_l, PUBLISHED, 804_362_240),
        (open_magvit2_ar_xl, PUBLISHED, 1_486_679_040),
        (ibq_ar_b, CODES, 342_994_944),
        (ibq_ar_l, CODES, 649_640_960),
        (ibq_ar_xl, CODES, 1_076_103_168),
        (ibq_ar_xxl, CODES, 2_063_331_840),
    ],
)
def test_published_variants(
    preset: Callable[[Layout], Generator], layout: Layout, count: int
) -> None:
    with torch.device("meta"):
        generator = preset(layout)
    assert sum(parameter.numel() for parameter in generator.parameters()) == count


def small(seed: int = 0) -> OpenMAGVIT2AR:
    torch.manual_seed(seed)
    made = OpenMAGVIT2AR(LAYOUT, 32, 2, 4, 2, 5, dropout=0.0, ffn_multiple_of=8).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens_of(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 9, 2, generator=draw) * torch.tensor([5, 7])).long()


def logits(generator: OpenMAGVIT2AR, tokens: Tensor) -> list[Tensor]:
    scores = generator.score(tokens, LABELS)
    assert isinstance(scores, FactorLogits) and scores.together is not None
    return list(scores.together(tokens))


def test_the_first_loss_is_that_of_chance() -> None:
    """Heads start at zero: ln 64 + ln 4096 for the published sub-tokens, ln V for IBQ."""
    pair = OpenMAGVIT2AR(grid_layout(2, 2, Factorized((64, 4096))), 32, 1, 2, 1, 5)
    one = IBQAR(grid_layout(2, 2, Categorical(50)), 32, 1, 2, 5)
    labels = Condition(ids=torch.tensor([1]))
    tokens = torch.tensor([[[63, 4095], [0, 0], [5, 1], [7, 9]]])
    assert float(pair.loss(tokens, labels)["cross_entropy"].detach()) == pytest.approx(
        12.4766, abs=1e-4
    )
    found = float(one.loss(tokens[..., 0] % 50, labels)["cross_entropy"].detach())
    assert found == pytest.approx(math.log(50), abs=1e-5)


@torch.no_grad()
def test_the_second_sub_token_sees_the_first_and_neither_sees_itself() -> None:
    generator = small()
    tokens = tokens_of()
    first, second = logits(generator, tokens)
    place = 4
    for factor, vocab in ((0, 5), (1, 7)):
        other = tokens.clone()
        other[:, place, factor] = (other[:, place, factor] + 1) % vocab
        changed_first, changed_second = logits(generator, other)
        assert torch.equal(changed_first[:, : place + 1], first[:, : place + 1])
        assert torch.equal(changed_second[:, :place], second[:, :place])
        sees = not torch.allclose(changed_second[:, place], second[:, place])
        assert sees is (factor == 0)
        assert not torch.allclose(changed_first[:, place + 1], first[:, place + 1])


@torch.no_grad()
def test_one_walk_gives_what_all_sub_tokens_at_once_are() -> None:
    generator = small()
    tokens = tokens_of()
    state = generator.start(LABELS, GUIDED)
    found = generator.predict(state, tokens, 9)
    assert isinstance(found, FactorLogits) and found.together is not None
    first, second = found.together(tokens)
    walk = found.walk()
    known = tokens * torch.tensor([1, 0])
    torch.testing.assert_close(walk(torch.zeros_like(tokens), 0)[..., 0, :], first)
    torch.testing.assert_close(walk(known, 1)[..., 0, :], second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.head(known, 1), second, atol=1e-5, rtol=1e-5)
    by_steps = FactorLogits(found.head, found.order, found.shape).log_prob(tokens)
    torch.testing.assert_close(found.log_prob(tokens), by_steps, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_each_sub_token_has_its_own_scale() -> None:
    """Scale 1 at the first: as without guidance; 3 at the second: as with 3 everywhere."""
    generator = small()
    tokens = tokens_of()
    found = {}
    for name, rule in (("plain", NO_GUIDANCE), ("both", GUIDED), ("three", Guidance(Constant(3)))):
        scores = generator.predict(generator.start(LABELS, rule), tokens, 9)
        assert isinstance(scores, FactorLogits) and scores.together is not None
        found[name] = scores.together(tokens)
    torch.testing.assert_close(found["both"][0], found["plain"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["both"][1], found["three"][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["both"][1], found["plain"][1], atol=1e-2)


def test_each_sub_token_has_its_own_temperature() -> None:
    """The first at random, the second greedily, given the first."""
    generator = small()
    choice = Choice(1.0, further_temperatures=(0.0,))
    labels = Condition(ids=torch.arange(4))
    tokens = Sampling(choice=choice).tokens(generator, labels, range(4))
    with torch.no_grad():
        scores = generator.score(tokens, labels)
        assert isinstance(scores, FactorLogits) and scores.together is not None
        first, second = scores.together(tokens)
    assert torch.equal(tokens[..., 1], second.argmax(-1))
    assert not torch.equal(tokens[..., 0], first.argmax(-1))
    assert choice.of_factor(5).temperature == 0.0 and Choice(0.7).of_factor(1).temperature == 0.7


def test_settings_of_sub_tokens_are_written_down_and_read_again() -> None:
    made = Sampling(PerSubToken(1.9, further=(2.0,)), Choice(1.1, further_temperatures=(1.0,)))
    described = made.describe()
    assert described["choice"]["further_temperatures"] == [1.0]
    assert described["guidance"]["init_args"] == {"scale": 1.9, "further": [2.0]}
    assert Choice(**described["choice"]) == made.choice
    assert "further_temperatures" not in Sampling().describe()["choice"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(further_temperatures=(1e-9,)), "temperature is 1e-09"),
        (lambda: Choice(further_temperatures=(float("nan"),)), "temperature is nan"),
        (lambda: PerSubToken(2.0, further=(float("inf"),)), "guidance further is inf"),
        (lambda: PerSubToken(2.0, further=3.0), "guidance further is 3.0; it must be a list"),  # type: ignore[arg-type]
        (lambda: Choice(bit_steps=4), "bit_steps is 4; it must be a list"),  # type: ignore[arg-type]
        (lambda: OpenMAGVIT2AR(CODES), "predicts tokens of several sub-tokens; this tokenizer"),
        (lambda: IBQAR(PUBLISHED), "LlamaGen predicts categorical tokens"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
