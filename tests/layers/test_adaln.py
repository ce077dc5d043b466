"""AdaLN: what a position is modulated with, zero initialisation; time embeddings that are the same everywhere."""

import math

import pytest
import torch
from torch import Tensor, nn

from tessellar.layers.adaln import AdaLNBlock, Modulation, spread
from tessellar.layers.time_embedding import TimeEmbedding, frequencies, sinusoid


class Mean(nn.Module):
    """Adds the mean over all positions: something that is not position-wise, with an argument of its own."""

    def forward(self, x: Tensor, factor: float) -> Tensor:
        assert x.ndim == 3
        return x + factor * x.mean(1, keepdim=True)


def block(zero: bool = False) -> AdaLNBlock:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8, elementwise_affine=False)
    return AdaLNBlock(Mean(), nn.Linear(8, 8), norm, Modulation(8, zero=zero))


@pytest.mark.parametrize("sizes", [(6,), (2, 2, 2), (1, 2, 3), (1, 1, 1, 1, 1, 1)])
def test_every_position_gets_the_vectors_of_its_entity(sizes: tuple[int, ...]) -> None:
    made, x, condition = block(), torch.randn(3, 6, 8), torch.randn(3, len(sizes), 8)
    entity = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    gate1, gate2, scale1, scale2, shift1, shift2 = made.modulation(condition[:, entity])
    middle = x + gate1 * made.attention(made.norm(x) * (1 + scale1) + shift1, 0.5)
    expected = middle + gate2 * made.mlp(made.norm(middle) * (1 + scale2) + shift2)
    torch.testing.assert_close(made(x, condition, sizes, 0.5), expected)
    if len(sizes) > 1:
        assert torch.equal(spread(condition, sizes), condition[:, entity])


def test_zero_modulation_is_the_identity() -> None:
    x = torch.randn(2, 4, 8)
    assert torch.equal(block(zero=True)(x, torch.randn(2, 1, 8), (4,), 1.0), x)


def test_sinusoid_is_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 3.0, 999.0])
    made = sinusoid(t, 8)
    for i in range(4):
        angle = t.double() * 10000 ** (-i / 4)
        torch.testing.assert_close(made[:, i].double(), angle.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(made[:, 4 + i].double(), angle.sin(), atol=1e-4, rtol=0)


def test_frequencies_are_within_half_a_bit_of_what_float32_gives() -> None:
    made = frequencies(128, 10000.0, torch.device("cpu"))
    argument = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    exact = torch.tensor([math.exp(a) for a in argument.tolist()], dtype=torch.float64)
    assert bool(((made - exact).abs() <= 2.0**-24 * exact).all())
    as_float = made.float().double()
    assert 0 < int((made != as_float).sum()) < 16  # near ties alone keep more bits


def test_time_embedding_takes_any_shape() -> None:
    embedding = TimeEmbedding(6, 16)
    t = torch.tensor([[0.0, 500.0], [999.0, 1.0]])
    together = embedding(t)
    assert together.shape == (2, 2, 6)
    torch.testing.assert_close(together[1, 0], embedding(t[1, 0]))
