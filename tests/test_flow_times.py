"""Times of flow training: the laws that are named, one draw in each part where they are stratified."""

import math
from typing import Any

import pytest
import torch

from tessellar.processes.flow import Times, mode_times


@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("stratified", [False, True])
def test_logit_normal_times(stratified: bool, mean: float) -> None:
    torch.manual_seed(0)
    logits = Times(stratified=stratified, mean=mean).draw(4000).double().logit()
    assert abs(float(logits.mean()) - mean) < 0.06 and abs(float(logits.std()) - 1) < 0.06


@pytest.mark.parametrize("stratified", [False, True])
def test_a_deviation_and_a_shift_of_logit_normal_times(stratified: bool) -> None:
    """A shift by s adds log s to the logits."""
    torch.manual_seed(0)
    times = Times(stratified=stratified, mean=0.8, std=0.5, time_shift=3.0)
    logits = times.draw(4000).double().logit()
    assert abs(float(logits.mean()) - 0.8 - math.log(3)) < 0.04
    assert abs(float(logits.std()) - 0.5) < 0.03
    normal = torch.randn(5, 2)
    torch.testing.assert_close(times.of_normal(normal).logit(), 0.5 * normal + 0.8 + math.log(3))


@pytest.mark.parametrize("law", ["logit_normal", "mode"])
def test_stratified_draws_fill_every_part(law: Any) -> None:
    drawn = Times(law, stratified=True).draw(64).double()
    uniform = drawn if law == "mode" else torch.special.ndtr(drawn.logit())
    parts = (uniform * 64).floor().clamp(0, 63).long()
    assert parts.unique().numel() >= 62  # rounding may move a draw over an edge
    assert not torch.equal(parts, parts.sort().values)  # which image has which time is random


def test_mode_times_keep_the_ends_and_crowd_the_middle() -> None:
    u = torch.linspace(0, 1, 1001)
    assert torch.equal(mode_times(u, 0.0), 1 - u)
    times = mode_times(u, 1.29)
    assert abs(float(times[0]) - 1) < 1e-6 and abs(float(times[-1])) < 1e-6
    near = ((times - 0.5).abs() < 0.1).float().mean()
    assert float(near) > 0.25  # uniform: 0.2


def test_an_unknown_law() -> None:
    with pytest.raises(ValueError, match="law of times is 'uniform'"):
        Times("uniform")  # type: ignore[arg-type]
