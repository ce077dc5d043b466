"""Optimizer groups follow tags; schedules pass through their landmarks."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from tessellar.layers.tags import tag, untag
from tessellar.schedules import Schedule
from tessellar.training.base import TrainingModule
from tessellar.training.muon import Muon
from tessellar.training.optim import OptimizerSettings, set_factor


class StopAfter(L.Callback):
    """Ends a run of more updates after `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        trainer.should_stop = module.updates >= self.count  # type: ignore[operator]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.table = nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(3, 4)
        tag(self.inner.weight, "hidden")
        tag(self.table.weight, "no_decay")


def groups(settings: OptimizerSettings, module: nn.Module) -> dict[str, tuple[str, float]]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {
        names[id(p)]: (type(optimizer).__name__, group["weight_decay"])
        for optimizer in settings.make(module)
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_matrices_decay_unless_tagged() -> None:
    found = groups(OptimizerSettings(weight_decay=0.1), Small())
    assert found == {
        "inner.weight": ("AdamW", 0.1),
        "outer.weight": ("AdamW", 0.1),
        "inner.bias": ("AdamW", 0.0),
        "outer.bias": ("AdamW", 0.0),
        "table.weight": ("AdamW", 0.0),
    }


def test_muon_takes_the_hidden_matrices_only() -> None:
    found = groups(OptimizerSettings("muon"), Small())
    assert [name for name, (kind, _) in found.items() if kind == "Muon"] == ["inner.weight"]
    assert len(found) == 5


def test_frozen_parameters_are_left_out() -> None:
    module = Small()
    module.table.requires_grad_(False)
    assert "table.weight" not in groups(OptimizerSettings(), module)


def test_factor_scales_every_peak() -> None:
    optimizers = OptimizerSettings("muon", lr=0.01, muon_lr=0.2).make(Small())
    for factor in (0.5, 0.1):  # from the peak, not from the last value
        set_factor(optimizers, factor)
    rates = {type(o).__name__: o.param_groups[0]["lr"] for o in optimizers}
    assert rates == pytest.approx({"AdamW": 0.001, "Muon": 0.02})


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(), {0: 1, 99: 1}),
        (Schedule(warmup=10), {0: 0.1, 4: 0.5, 9: 1, 50: 1}),
        (Schedule("linear", decay_start=0.4), {0: 1, 40: 1, 70: 0.5, 100: 0}),
        (Schedule("linear", warmup=20), {9: 0.5, 20: 1, 60: 0.5, 100: 0}),
        (Schedule("cosine", final=0.1), {0: 1, 50: 0.55, 100: 0.1, 200: 0.1}),
        (Schedule("sqrt", decay_start=0.8), {0: 1, 80: 1, 85: 0.5, 90: 1 - 0.5**0.5, 100: 0}),
        (Schedule(warmup=10, warmup_from=0.0), {0: 0, 5: 0.5, 9: 0.9, 10: 1, 50: 1}),
        (Schedule(milestones=(20, 60)), {0: 1, 19: 1, 20: 0.1, 59: 0.1, 60: 0.01, 100: 0.01}),
        (
            Schedule("linear", milestones=(50,), milestone_factor=0.5),
            {25: 0.75, 50: 0.25, 75: 0.125},
        ),
        (
            Schedule("linear", warmup=10, decay_start=0.5, warmup_from=0.2),
            {0: 0.2, 5: 0.6, 10: 1, 75: 0.5},
        ),
    ],
)
def test_schedules(schedule: Schedule, expected: dict[int, float]) -> None:
    assert {step: schedule.factor(step, 100) for step in expected} == pytest.approx(expected)


def test_weight_decay_may_change_along_half_a_cosine() -> None:
    schedule = Schedule(final_weight_decay=0.08)
    values = {step: schedule.weight_decay(0.05, step, 101) for step in (0, 25, 50, 100, 200)}
    assert values == pytest.approx(
        {0: 0.05, 25: 0.065 - 0.015 * 0.5**0.5, 50: 0.065, 100: 0.08, 200: 0.08}
    )
    assert (
        schedule.weight_decay(0.0, 50, 101) == 0 and Schedule().weight_decay(0.05, 50, 101) == 0.05
    )


def test_a_run_follows_its_weight_decay_and_so_does_its_resume(
    fit, make, tmp_path: Path, caplog
) -> None:
    options = {
        "optimizer": OptimizerSettings(lr=1e-3, weight_decay=0.1),
        "schedule": Schedule(final_weight_decay=0.3),
    }

    def decays(module: TrainingModule) -> list[float]:
        return [group["weight_decay"] for group in module.players[0].optimizers[0].param_groups]

    whole, first = make.generator_module(**options), make.generator_module(**options)
    fit(whole, 5)
    assert decays(whole) == pytest.approx([0.3, 0.0])
    trainer, _ = fit(first, 5, callbacks=[StopAfter(3)])
    assert decays(first) == pytest.approx([0.2, 0.0])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = make.generator_module(**options)
    with caplog.at_level(logging.WARNING):
        fit(second, 5, ckpt_path=tmp_path / "half.ckpt")
    assert decays(second) == pytest.approx([0.3, 0.0])
    assert "weight_decay is now" not in caplog.text
    for (name, a), b in zip(
        whole.model.generator.named_parameters(), second.model.generator.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_muon_learns() -> None:
    torch.manual_seed(0)
    layer, target = nn.Linear(8, 8, bias=False), torch.randn(8, 8)
    tag(layer.weight, "hidden")
    (optimizer,) = OptimizerSettings("muon", muon_lr=0.05).make(layer)
    losses = []
    for _ in range(100):
        loss = (layer.weight - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_vectors_decay_where_they_are_tagged_and_all_in_a_single_group() -> None:
    module = Small()
    tag(module.inner.bias, "decay")
    found = groups(OptimizerSettings(weight_decay=0.1), module)
    assert found["inner.bias"] == ("AdamW", 0.1) and found["outer.bias"] == ("AdamW", 0.0)
    every = groups(OptimizerSettings(weight_decay=0.1, decayed="all"), module)
    assert set(every.values()) == {("AdamW", 0.1)} and len(every) == 5


def test_a_part_of_a_model_is_untagged_where_a_system_differs() -> None:
    module = Small()
    untag(module.table.weight, "no_decay")
    assert groups(OptimizerSettings(weight_decay=0.1), module)["table.weight"] == ("AdamW", 0.1)


def test_a_tag_that_would_be_lost_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn.Parameter, not on a Tensor: write tag\(nn.Parameter"):
        nn.Parameter(tag(torch.empty(3, 4), "no_decay"))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_in_float32_is_torchs_but_for_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = torch.randn(3, *shape)
    ends = []
    for kind in (torch.optim.Muon, Muon):
        parameter = nn.Parameter(start.clone())
        optimizer = kind(
            [parameter], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original"
        )
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach() - start)
    assert optimizer.state[parameter].keys() == {"momentum_buffer"}
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()
