"""Adaptive projected guidance: what is added is orthogonal and bounded, and remembers earlier steps."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.processes.apg import APG, project


@pytest.fixture
def predictions() -> tuple[Tensor, Tensor]:
    draws = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return draws[0], draws[1]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def test_the_addition_is_orthogonal_and_bounded(predictions: tuple[Tensor, Tensor]) -> None:
    conditional, null = predictions
    guided, _ = APG().step(conditional, null, 7.5, None)
    added = guided - conditional
    assert float(_dot(added, conditional).abs().max()) < 1e-3
    norms = added.flatten(1).norm(dim=1)
    assert bool((norms <= 2.5 * 6.5 + 1e-3).all()) and bool((norms > 10).all())


def test_equal_predictions_stay(predictions: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(APG().step(predictions[0], predictions[0], 7.5, None)[0], predictions[0])
    assert torch.equal(APG().step(*predictions, 1.0, None)[0], predictions[0])


def test_without_bounds_and_projection_it_is_plain_guidance(
    predictions: tuple[Tensor, Tensor],
) -> None:
    conditional, null = predictions
    guided, _ = APG(momentum=0.0, threshold=None, eta=1.0).step(conditional, null, 3.0, None)
    torch.testing.assert_close(guided, null + 3 * (conditional - null))


def test_momentum_subtracts_what_was_added_before(predictions: tuple[Tensor, Tensor]) -> None:
    conditional, null = predictions
    settings = APG(threshold=None)
    _, average = settings.step(conditional, null, 2.0, None)
    guided, average = settings.step(conditional, null, 2.0, average)
    torch.testing.assert_close(average, 0.5 * (conditional - null))
    expected = conditional + 0.5 * project(conditional - null, conditional)[1]
    torch.testing.assert_close(guided, expected)


def test_images_of_a_batch_are_guided_alone(predictions: tuple[Tensor, Tensor]) -> None:
    conditional, null = predictions
    together, _ = APG().step(conditional, 10 * null, 4.0, None)
    alone, _ = APG().step(conditional[1:2], 10 * null[1:2], 4.0, None)
    torch.testing.assert_close(together[1:2], alone)


def test_a_threshold_must_be_positive() -> None:
    with pytest.raises(UserError, match="threshold of adaptive projected guidance is 0"):
        APG(threshold=0.0)
