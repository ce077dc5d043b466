"""Cross-entropy in parts: equal to that of all logits, in a fraction of their memory."""

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.linear_cross_entropy import linear_cross_entropy
from tessellar.training.live_bytes import LiveBytes


def together(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight).float(), targets, reduction="none")


def inputs(rows: int, codes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=draws).requires_grad_()
    weight = (torch.randn(codes, width, generator=draws) / width**0.5).requires_grad_()
    return states, weight, torch.randint(codes, (rows,), generator=draws)


def results(function, rows: int, codes: int, width: int, precision=None) -> list[Tensor]:
    """Losses, and gradients of their weighted sum."""
    states, weight, targets = inputs(rows, codes, width)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        losses = function(states, weight, targets)
    (losses * torch.linspace(0, 2, rows)).sum().backward()
    assert states.grad is not None and weight.grad is not None
    return [losses.detach(), states.grad, weight.grad]


@pytest.mark.parametrize("rows", [1, 64, 65, 1000])
def test_losses_and_gradients_are_those_of_all_logits(rows: int) -> None:
    ours = results(linear_cross_entropy, rows, 300, 32)
    theirs = results(together, rows, 300, 32)
    assert float(ours[0].sum()) == pytest.approx(float(theirs[0].sum()), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm()) <= 1e-5 * float(other.norm())


def test_under_autocast_sums_keep_float32() -> None:
    ours = results(linear_cross_entropy, 500, 300, 32, torch.bfloat16)
    exact = results(together, 500, 300, 32)
    rounded = results(together, 500, 300, 32, torch.bfloat16)
    assert ours[0].dtype == torch.float32
    for mine, true, other in zip(ours, exact, rounded, strict=True):
        assert (mine - true).norm() <= 1.05 * (other - true).norm() + 1e-6 * true.norm()


def live_bytes(function, rows: int, codes: int, width: int) -> int:
    states, weight, targets = inputs(rows, codes, width)
    gc.collect()
    with LiveBytes([tuple(weight.shape)]) as live:
        function(states, weight, targets).mean().backward()
    return live.most


@pytest.mark.parametrize(
    "sizes",
    [(256, 4096, 16), pytest.param((512, 65_536, 768), marks=pytest.mark.long)],
)
def test_at_most_two_fifths_of_the_memory_of_all_logits(sizes: tuple[int, int, int]) -> None:
    rows, codes, _ = sizes
    usual = live_bytes(together, *sizes)
    assert usual >= 2 * 4 * rows * codes  # so the count sees the tables
    assert live_bytes(linear_cross_entropy, *sizes) <= 0.4 * usual
