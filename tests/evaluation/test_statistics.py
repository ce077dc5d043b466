"""Streaming mean and covariance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessellar.errors import UserError
from tessellar.measures.statistics import BLOCK, FeatureStatistics, Moments


def collected(features: torch.Tensor, sizes: list[int]) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(sizes):
        statistics.update(part)
    return statistics


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1))
def test_any_cut_into_batches_gives_numpys_moments(sizes: list[int]) -> None:
    features = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(1))
    moments = collected(features, sizes).moments()
    np.testing.assert_allclose(moments.mean, features.double().mean(0), atol=1e-13)
    np.testing.assert_allclose(moments.cov, np.cov(features.double(), rowvar=False), atol=1e-13)
    assert moments.count == sum(sizes)


def test_merging_equals_one_pass() -> None:
    features = torch.randn(50, 4)
    whole, first, second = (
        collected(features, [50]),
        collected(features[:13], [13]),
        collected(features[13:], [37]),
    )
    for part in (FeatureStatistics(4), second):
        first.merge(part)
    torch.testing.assert_close(first.moments().cov, whole.moments().cov, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.moments().mean, whole.moments().mean, rtol=1e-12, atol=0)


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares in float64 would lose ten of sixteen digits here."""
    features = torch.randn(200, 3, dtype=torch.float64)
    cov = collected(features + 1e7, [64, 64, 72]).moments().cov
    torch.testing.assert_close(cov, collected(features, [200]).moments().cov, rtol=0, atol=1e-7)


def test_state_does_not_grow_with_images() -> None:
    def size(count: int) -> int:
        statistics = collected(torch.randn(count, 4), [100] * (count // 100))
        held = [statistics.mean, statistics.scatter, *statistics.pending]
        return sum(tensor.numel() for tensor in held)

    assert size(1_000) <= 4 + 16 + BLOCK * 4 and size(20_000) <= 4 + 16 + BLOCK * 4


def test_many_features_are_summed_in_blocks_of_columns() -> None:
    features = torch.randn(700, 600)
    np.testing.assert_allclose(
        collected(features, [300, 400]).moments().cov, np.cov(features.double().T), atol=1e-12
    )


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        FeatureStatistics(2).update(torch.tensor([[1.0, broken]]))
    with pytest.raises(UserError, match="not finite"):
        Moments(torch.tensor([broken]), torch.ones(1, 1))


def test_wrong_shapes_and_too_few_images_are_refused() -> None:
    statistics = FeatureStatistics(2)
    with pytest.raises(ValueError, match=r"these statistics need \[B, 2\]"):
        statistics.update(torch.zeros(3, 4))
    statistics.update(torch.zeros(1, 2))
    with pytest.raises(UserError, match="at least 2 images; there are 1"):
        statistics.moments()
