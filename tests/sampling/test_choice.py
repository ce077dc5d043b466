"""The draw: filters keep what they say, sampling follows the probabilities, streams belong to images."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.noise import Noise

LOGITS = torch.tensor([[2.0, 1.0, 1.0, 0.0, -1.0]])


def kept(choice: Choice, logits: torch.Tensor = LOGITS) -> list[int]:
    return choice.probs(logits)[0].nonzero().flatten().tolist()


def test_filters() -> None:
    assert kept(Choice(top_k=1)) == [0]
    assert kept(Choice(top_k=2)) == [0, 1, 2]  # the tie at the second value stays
    assert kept(Choice(top_k=99)) == [0, 1, 2, 3, 4]
    assert kept(Choice(top_p=0.01)) == [0]
    probs = LOGITS.softmax(-1)[0]
    assert kept(Choice(top_p=float(probs[:3].sum()) + 1e-4)) == [0, 1, 2, 3]
    assert kept(Choice(min_p=0.3)) == [0, 1, 2]


def test_probabilities_are_normalised_and_tempered() -> None:
    for choice in (Choice(), Choice(0.7, 3, 0.8, 0.05), Choice(0)):
        assert choice.probs(LOGITS).sum().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(Choice(0.5).probs(LOGITS), (LOGITS / 0.5).softmax(-1))


def test_greedy_is_the_argmax_whatever_the_noise() -> None:
    logits = torch.randn(4, 6, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Choice(0).draw(logits, Noise(range(4))), logits.argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 5 codes with 20,000 draws; the bound 23.5 has a false-alarm rate of 1e-4."""
    draws = Choice().draw(LOGITS[:, None].expand(1, 20_000, 5), Noise([3])).flatten()
    expected = LOGITS.softmax(-1)[0] * 20_000
    assert float(((draws.bincount(minlength=5) - expected) ** 2 / expected).sum()) < 23.5


def test_a_stream_belongs_to_its_image() -> None:
    together, alone = Noise([4, 9]), Noise([9])
    for shape in ((3,), (2, 5)):
        assert torch.equal(together.uniform(*shape)[1], alone.uniform(*shape)[0])
    assert bool((together.exponential(100) > 0).all())


def test_select_continues_streams() -> None:
    noise = Noise([1, 2])
    noise.uniform(3)
    fork = noise.select(torch.tensor([1, 1]))
    expected = noise.uniform(4)[1]
    assert torch.equal(fork.uniform(4), expected.expand(2, 4))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -3}, {"min_p": 1.0}],
)
def test_impossible_settings(options: dict) -> None:
    with pytest.raises(UserError):
        Choice(**options)
