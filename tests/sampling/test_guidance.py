"""Guidance: each schedule at its landmarks, the merge, and a user's mistakes."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.entities import ordered
from tessellar.protocol.guidance import Constant, Guidance, GuidanceSettings

FIVE = ordered(range(5), [1] * 5)


@pytest.mark.parametrize(
    "schedule, options, expected",
    [
        ("constant", {}, [3, 3, 3, 3, 3]),
        ("linear", {}, [1, 1.5, 2, 2.5, 3]),
        ("linear", {"start": 0.0}, [0, 0.75, 1.5, 2.25, 3]),
        ("cosine", {}, [1, 1.2928932, 2, 2.7071068, 3]),
        ("power_cosine", {"power": 2.0}, [1, 1.0192147, 1.2928932, 2.1950903, 3]),
        ("half_linear", {}, [1, 2, 3, 3, 3]),
        ("half_cosine", {}, [1, 2, 3, 3, 3]),
        ("step", {"first": 3}, [1, 1, 1, 3, 3]),
        ("interval", {"first": 1, "last": 2}, [1, 3, 3, 1, 1]),
    ],
)
def test_schedules(schedule: str, options: dict[str, float], expected: list[float]) -> None:
    made = GuidanceSettings(3.0, schedule, options).make().schedule
    assert made is not None
    scales = made(torch.arange(5)[None], FIVE)
    torch.testing.assert_close(scales, torch.tensor([expected], dtype=torch.float32))


def test_schedules_hold_past_the_end() -> None:
    for name in ("constant", "linear", "cosine", "power_cosine"):
        schedule = GuidanceSettings(3.0, name).make().schedule
        assert schedule is not None
        assert schedule(torch.tensor([[9]]), FIVE).item() == pytest.approx(3.0)


def test_merge_extrapolates_and_is_exact_at_one() -> None:
    x = torch.tensor([[[0.1, 0.7]], [[0.3, -0.2]]])
    entity = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(Guidance(Constant(1.0)).merge(x, entity, FIVE), x[:1])
    torch.testing.assert_close(Guidance(Constant(3.0)).merge(x, entity, FIVE), x[1:] + 3 * (x[:1] - x[1:]))


def test_a_scale_belongs_to_its_own_row() -> None:
    guidance = GuidanceSettings(3.0, "step", {"first": 2}).make()
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(4, 1, 1)
    merged = guidance.merge(x, torch.tensor([[0], [2]]), FIVE)
    assert merged.flatten().tolist() == [1.0, 3.0]


def test_no_guidance_costs_no_rows() -> None:
    assert GuidanceSettings(1.0).make().branches == 1
    assert GuidanceSettings(1.5).make().branches == 2


@pytest.mark.parametrize("settings", [{"schedule": "cosin"}, {"scale": 2.0, "options": {"powr": 1.0}}])
def test_mistakes_are_named(settings: dict) -> None:
    with pytest.raises(UserError, match="cosin|powr"):
        GuidanceSettings(**settings)
