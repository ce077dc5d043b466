"""Flow: variances of both solvers against their recursion on a normal law, step plans, refusals."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.processes.flow import (
    Euler,
    EulerMaruyama,
    EulerMaruyamaToData,
    Flow,
    interpolate,
    logit_normal,
    sde_times,
    shifted,
    target,
)
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling

SHAPE = (100, 100)


def gain(t: Tensor) -> Tensor:
    """The exact velocity for data from N(0, I) is gain(t) x."""
    return (2 * t - 1) / (t.square() + (1 - t).square())


def normal_velocity(x: Tensor, t: Tensor) -> Tensor:
    return gain(t) * x


@pytest.mark.parametrize(
    "flow, variance",
    [
        (EulerMaruyama(50), 0.9730),
        (EulerMaruyama(40), 0.9677),
        (Euler(50), 0.9499),
        (Euler(40), 0.9377),
    ],
    ids=str,
)
def test_variance_of_a_normal_law(flow: Flow, variance: float) -> None:
    """xAR's spec: from variance 1, with the error of finitely many steps; 2e5 draws have a deviation of 0.003."""
    drawn = ImplicitFlow(normal_velocity, SHAPE).sample(Sampling(flow=flow), Noise(range(20)))
    assert drawn.shape == (20, *SHAPE) and drawn.dtype == torch.float32
    assert abs(float(drawn.var()) - variance) < 0.012 and abs(float(drawn.mean())) < 0.01


def test_variance_recursion() -> None:
    for steps, expected in ((50, 0.9730), (40, 0.9677)):
        times, variance = sde_times(steps), 1.0
        for number, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
            dt = float(after - t)
            variance *= (1 + ((2 - float(t)) * float(gain(t)) + 1) * dt) ** 2
            variance += 2 * float(t) * -dt if number < steps - 1 else 0.0
        assert abs(variance - expected) < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_to_the_data_and_its_last_step(shift: float) -> None:
    """Even from 1, or moved towards noise; the last evaluation stays where it is, and ends at its prediction."""
    seen = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return (x - 0.3) / t.float()

    flow = EulerMaruyamaToData(5, last_time=0.2, time_shift=shift)
    drawn = flow.integrate(velocity, (2, 3), Noise([1, 2]))
    expected = shifted(torch.linspace(1, 0.2, 5), shift).tolist()
    assert seen[:4] == pytest.approx(expected[:4], abs=1e-5) and seen[4] == pytest.approx(0.2)
    torch.testing.assert_close(drawn, torch.full((2, 2, 3), 0.3), atol=1e-5, rtol=0)


def test_both_solvers_reach_a_point_that_the_velocity_names() -> None:
    """Data that is one point: v = (x - point) / t leads there in any number of ODE steps."""
    point = torch.tensor([1.0, -2.0, 3.0]).double()
    for steps in (1, 2, 7):
        drawn = Euler(steps).integrate(lambda x, t: (x - point) / t, (4, 3), Noise([0, 1]))
        torch.testing.assert_close(drawn, point.float().expand(2, 4, 3), atol=1e-5, rtol=0)


def test_path_and_velocity_agree() -> None:
    x, noise, t = torch.randn(2, 5, 3), torch.randn(2, 5, 3), logit_normal(2, 5)[..., None]
    torch.testing.assert_close(interpolate(x, noise, t) - t * target(x, noise), x)
    torch.testing.assert_close(interpolate(x, noise, t) + (1 - t) * target(x, noise), noise)


def test_annealed_steps_are_disas() -> None:
    flow = EulerMaruyama(50, last_steps=15)
    assert [flow.steps_of(n, 4) for n in range(4)] == [50, 38, 26, 15] and flow.steps_of(0, 1) == 50
    calls: list[float] = []
    for n in range(4):
        drawn = ImplicitFlow(lambda x, t: calls.append(float(t)) or x, (1, 1), n, 4)
        drawn.sample(Sampling(flow=EulerMaruyama(9, last_steps=3)), Noise([0]))
    assert len(calls) == 9 + 7 + 5 + 3


def test_an_image_depends_on_its_own_seed() -> None:
    both = EulerMaruyama(5).integrate(normal_velocity, (2, 3), Noise([4, 5]))
    assert torch.equal(both[1:], EulerMaruyama(5).integrate(normal_velocity, (2, 3), Noise([5])))


@pytest.mark.parametrize(
    ("solver", "options"),
    [(EulerMaruyama, {"steps": 1}), (Euler, {"steps": 0}), (EulerMaruyama, {"last_steps": 1})],
)
def test_too_few_steps(solver: type[Flow], options: dict) -> None:
    with pytest.raises(UserError, match="must be an integer in "):
        solver(**options)
