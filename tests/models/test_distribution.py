"""Distributions of several sub-tokens and of bits: draws are exact, probabilities sum to one, order is kept."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tessellar.protocol.choice import Choice
from tessellar.protocol.distribution import Bits, Distribution, FactorLogits, ImplicitFlow, Logits
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import GREEDY, Sampling

VOCABS = (3, 2, 4)
FALSE_ALARM = 1e-5
"""How often the test of exactness fails although all is well, over the streams of random numbers."""
BATCH, LENGTH = 20, 600


def factor_head(order: tuple[int, ...]) -> Callable[[Tensor, int], Tensor]:
    """A sub-token's logits depend on those before it alone; a head that is shown later ones fails."""
    draw = torch.Generator().manual_seed(0)
    own = [0.5 * torch.randn(size, generator=draw) for size in VOCABS]
    weight = [0.4 * torch.randn(len(VOCABS), size, generator=draw) for size in VOCABS]

    def head(known: Tensor, factor: int) -> Tensor:
        later = list(order[order.index(factor) :])
        assert not bool(known[..., later].any())
        return own[factor] + known.float() @ weight[factor]

    return head


def bit_head(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    own, weight = torch.randn(count, generator=draw), torch.randn(count, count, generator=draw)

    def head(known: Tensor, shown: Tensor) -> Tensor:
        assert not bool(known[..., ~shown].any())
        return own + (known.float() - 0.3 * shown) @ weight

    return head


def factors(order: tuple[int, ...]) -> Callable[[int, int], Distribution]:
    return lambda batch, length: FactorLogits(factor_head(order), order, (batch, length))


def bits(*sets: tuple[int, ...]) -> Callable[[int, int], Distribution]:
    return lambda batch, length: Bits(bit_head(4), sets, (batch, length))


KINDS: dict[str, tuple[Callable[[int, int], Distribution], tuple[int, ...]]] = {
    "factors": (factors((0, 1, 2)), VOCABS),
    "factors, another order": (factors((2, 0, 1)), VOCABS),
    "bits one by one": (bits((3,), (1,), (0,), (2,)), (2, 2, 2, 2)),
    "bits in sets": (bits((1, 2), (0, 3)), (2, 2, 2, 2)),
    "bits at once": (bits((0, 1, 2, 3)), (2, 2, 2, 2)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def outcomes(vocabs: tuple[int, ...]) -> Tensor:
    """Every token there is, [n, F]."""
    return torch.tensor(list(product(*map(range, vocabs))))


def law(kind: str) -> Tensor:
    """Probability [n] of every token."""
    make, vocabs = KINDS[kind]
    tokens = outcomes(vocabs)
    log_prob = make(1, len(tokens)).log_prob(tokens[None])
    assert log_prob is not None
    return log_prob[0].exp()


@every_kind
def test_probabilities_sum_to_one(kind: str) -> None:
    assert float(law(kind).sum()) == pytest.approx(1.0, abs=1e-5)


@every_kind
def test_draws_follow_the_law(kind: str) -> None:
    """Chi-square over all outcomes, of 12,000 tokens."""
    make, vocabs = KINDS[kind]
    drawn = make(BATCH, LENGTH).sample(Sampling(), Noise(range(BATCH)))
    place = torch.tensor([1])
    for size in reversed(vocabs[1:]):
        place = torch.cat([place[:1] * size, place])
    counts = (drawn * place).sum(-1).flatten().bincount(minlength=len(outcomes(vocabs)))
    expected = law(kind).double() * BATCH * LENGTH
    assert float(expected.min()) > 8
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0)
    assert float(torch.special.gammaincc(freedom / 2, statistic.float() / 2)) > FALSE_ALARM


@every_kind
def test_nats_are_those_of_all_tokens_of_an_image(kind: str) -> None:
    make, vocabs = KINDS[kind]
    tokens = outcomes(vocabs)[:6].view(2, 3, -1)
    distribution = make(2, 3)
    log_prob, nats = distribution.log_prob(tokens), distribution.nats(tokens)
    assert log_prob is not None and nats is not None and log_prob.shape == (2, 3)
    torch.testing.assert_close(nats, -log_prob.sum(1))


@every_kind
def test_greedy_takes_the_likeliest_step_by_step(kind: str) -> None:
    make, _ = KINDS[kind]
    greedy = make(2, 3).sample(GREEDY, Noise([0, 1]))
    assert bool((greedy == greedy[:1, :1]).all())
    cold = make(2, 3).sample(Sampling(choice=Choice(temperature=1e-4)), Noise([2, 3]))
    assert torch.equal(greedy, cold)


def test_independent_bits_are_bernoulli() -> None:
    log_odds = torch.tensor([[[0.0, 1.0, -2.0]]])
    made = Bits.independent(log_odds).log_prob(torch.tensor([[[1, 0, 1]]]))
    expected = (
        torch.tensor([0.5, 1 - torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(-2.0))])
        .log()
        .sum()
    )
    torch.testing.assert_close(made, expected.view(1, 1))


def test_logits_answer_log_prob_and_probs() -> None:
    logits = torch.randn(2, 3, 5)
    logits[:, 1, 4] = -torch.inf  # a smaller vocabulary, padded
    tokens = torch.randint(4, (2, 3))
    distribution = Logits(logits)
    torch.testing.assert_close(distribution.probs().sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(
        distribution.log_prob(tokens),
        distribution.probs().gather(-1, tokens[..., None])[..., 0].log(),
    )
    nats = distribution.nats(tokens)
    assert nats is not None
    torch.testing.assert_close(nats.sum() / 6, distribution.cross_entropy(tokens))


def test_what_a_solver_integrates_has_no_likelihood() -> None:
    implicit = ImplicitFlow(lambda x, t: x, (3, 4))
    tokens = torch.zeros(1, 3, 4)
    assert (
        implicit.log_prob(tokens) is None
        and implicit.nats(tokens) is None
        and implicit.probs() is None
    )


def test_hidden_states_ride_along() -> None:
    hidden = torch.randn(2, 3, 8)
    assert Logits(torch.zeros(2, 3, 5)).hidden is None
    assert Logits(torch.zeros(2, 3, 5)).with_hidden(hidden).hidden is hidden
