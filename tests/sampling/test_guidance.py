"""Guidance: each schedule at its landmarks, the merge, and a user's mistakes."""

from collections.abc import Callable

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.entities import ordered
from tessellar.protocol.guidance import (
    Constant,
    Cosine,
    Guidance,
    GuidanceSchedule,
    HalfCosine,
    HalfLinear,
    Interval,
    LateLinear,
    LateStep,
    Linear,
    PowerCosine,
    Step,
)

FIVE = ordered(range(5), [1] * 5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Constant(3.0), [3, 3, 3, 3, 3]),
        (Linear(3.0), [1, 1.5, 2, 2.5, 3]),
        (Linear(3.0, start=0.0), [0, 0.75, 1.5, 2.25, 3]),
        (Linear(3.0, reach_end=False), [1, 1.4, 1.8, 2.2, 2.6]),
        (Cosine(3.0), [1, 1.2928932, 2, 2.7071068, 3]),
        (PowerCosine(3.0, power=2.0), [1, 1.0192147, 1.2928932, 2.1950903, 3]),
        (HalfLinear(3.0), [1, 2, 3, 3, 3]),
        (HalfCosine(3.0), [1, 2, 3, 3, 3]),
        (Step(3.0, first=3), [1, 1, 1, 3, 3]),
        (Interval(3.0, first=1, last=2), [1, 3, 3, 1, 1]),
    ],
    ids=str,
)
def test_schedules(schedule: GuidanceSchedule, expected: list[float]) -> None:
    scales = schedule(torch.arange(5)[None], FIVE)
    torch.testing.assert_close(scales, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, PowerCosine])
def test_schedules_hold_past_the_end(kind: type[GuidanceSchedule]) -> None:
    assert kind(3.0)(torch.tensor([[9]]), FIVE).item() == pytest.approx(3.0)


def test_merge_extrapolates_and_is_exact_at_one() -> None:
    x = torch.tensor([[[0.1, 0.7]], [[0.3, -0.2]]])
    entity = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(Guidance(Constant(1.0)).merge(x, entity, FIVE), x[:1])
    torch.testing.assert_close(
        Guidance(Constant(3.0)).merge(x, entity, FIVE), x[1:] + 3 * (x[:1] - x[1:])
    )


def test_a_scale_belongs_to_its_own_row() -> None:
    guidance = Guidance(Step(3.0, first=2))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(4, 1, 1)
    merged = guidance.merge(x, torch.tensor([[0], [2]]), FIVE)
    assert merged.flatten().tolist() == [1.0, 3.0]


def test_no_guidance_costs_no_rows() -> None:
    assert Constant(1.0).guidance().branches == 1
    assert Constant(1.5).guidance().branches == 2


@pytest.mark.parametrize(
    "schedule",
    [Linear(1.0, start=0.5), Step(1.0, first=2, before=3.0), LateStep(1.0, start=0.7, between=2.0)],
)
def test_scale_one_is_no_guidance_only_where_it_is_one_everywhere(
    schedule: GuidanceSchedule,
) -> None:
    assert schedule.guidance().branches == 2 and (schedule(torch.arange(5)[None], FIVE) != 1).any()
    assert type(schedule)(1.0).guidance().branches == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(float("nan")), "guidance scale is nan; it must be a finite number"),
        (lambda: PowerCosine(float("inf")), "guidance scale is inf"),
        (lambda: Linear(2.0, start=float("nan")), "guidance start is nan"),
        (lambda: PowerCosine(2.0, power=float("nan")), "guidance power is nan"),
        (
            lambda: PowerCosine(2.0, power=-1.0),
            "guidance power is -1.0; it must be a finite number in \\[0, ",
        ),
        (lambda: Step(2.0, first=-1), "guidance first is -1"),
        (lambda: Step(2.0, before=float("inf")), "guidance before is inf"),
        (lambda: LateStep(2.0, start=float("nan")), "guidance start is nan"),
        (lambda: LateStep(2.0, between=float("nan")), "guidance between is nan"),
        (lambda: LateLinear(2.0, start=float("nan")), "guidance start is nan"),
        (
            lambda: Interval(2.0, first=3, last=1),
            "guidance last is 1; it must be an integer of at least 3",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], GuidanceSchedule], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
