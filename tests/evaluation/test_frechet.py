"""Fréchet distance: closed forms, and scipy's matrix square root as an oracle."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.measures.frechet import frechet_distance
from tessellar.measures.statistics import FeatureStatistics, Moments


def moments_of(features: Tensor) -> Moments:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.moments()


def gaussian(mean: float, deviations: list[float], turn: Tensor | None = None) -> Moments:
    cov = torch.diag(torch.tensor(deviations, dtype=torch.float64) ** 2)
    cov = cov if turn is None else turn @ cov @ turn.T
    return Moments(torch.full((len(deviations),), mean, dtype=torch.float64), cov)


def oracle(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
    return float(
        (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root).real
    )


def test_closed_form_of_commuting_covariances() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2, in any orthogonal basis."""
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    a, b = [1.0, 2.0, 0.5, 3.0], [2.0, 2.0, 1.5, 0.25]
    expected = 4 * 0.3**2 + sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert frechet_distance(gaussian(0.3, a, turn), gaussian(0, b, turn)) == pytest.approx(
        expected, rel=1e-12
    )


def test_closed_form_of_singular_covariances() -> None:
    assert frechet_distance(gaussian(0, [1, 0, 0]), gaussian(0, [0, 2, 0])) == pytest.approx(
        1 + 4, rel=1e-12
    )
    assert frechet_distance(gaussian(0, [1, 2, 0]), gaussian(0, [3, 2, 0])) == pytest.approx(
        4, rel=1e-12
    )
    assert frechet_distance(gaussian(2, [0, 0]), gaussian(0, [0, 0])) == 8


@pytest.mark.parametrize(("images", "dim"), [(500, 96), (97, 96), (40, 96)])
def test_equals_sqrtm(images: int, dim: int) -> None:
    """Also with fewer images than features, where the covariances are singular."""
    mixing = torch.randn(dim, dim) / dim**0.5
    a, b = (
        moments_of(torch.randn(images, dim) @ mixing + 0.2),
        moments_of(torch.randn(images + 3, dim)),
    )
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-6)


def test_equals_sqrtm_where_the_spectrum_spans_six_decades() -> None:
    """Truncating small eigenvalues too early would show in the fifth digit."""
    spread = torch.logspace(0, -3, 300, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))[0]
    a = moments_of(torch.randn(2000, 300, dtype=torch.float64) * spread)
    b = moments_of(torch.randn(2000, 300, dtype=torch.float64) * spread @ turn)
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-7)
    assert frechet_distance(a, a) < 1e-9


@pytest.mark.parametrize("known", [True, False])
def test_rounding_of_zero_eigenvalues_does_not_show(known: bool) -> None:
    """Equal to 1e-11 in another basis, where the zeros of a singular covariance round otherwise."""
    turn = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    x, y = torch.randn(40, 200, dtype=torch.float64), 2 * torch.randn(500, 200, dtype=torch.float64)
    x[:, :5] = 0
    pairs = [(moments_of(a), moments_of(b)) for a, b in ((x, y), (x @ turn, y @ turn))]
    if not known:
        pairs = [(Moments(a.mean, a.cov), Moments(b.mean, b.cov)) for a, b in pairs]
    here, there = (frechet_distance(a, b) for a, b in pairs)
    assert here == pytest.approx(there, rel=1e-11 if known else 1e-9)


def test_is_symmetric_and_zero_for_equal_sets() -> None:
    a, b = moments_of(torch.randn(30, 50)), moments_of(1.5 * torch.randn(80, 50))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert 0 <= frechet_distance(a, a) < 1e-10


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(UserError, match="2 features and the reference 3"):
        frechet_distance(gaussian(0, [1, 1]), gaussian(0, [1, 1, 1]))
