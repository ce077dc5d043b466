"""EMA: the average itself, warm-up, swapping, its own key, and what must never enter it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tessellar.callbacks.ema import EMA


def module(value: float = 0.0) -> SimpleNamespace:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return SimpleNamespace(ema_target=layer, updates=0)


def update(ema: EMA, pl_module: SimpleNamespace, value: float) -> None:
    nn.init.constant_(pl_module.ema_target.weight, value)
    pl_module.updates += 1
    ema.on_train_batch_end(None, pl_module)  # type: ignore[arg-type]


def started(decay: float) -> tuple[EMA, SimpleNamespace]:
    ema, pl_module = EMA(decay), module()
    ema.on_fit_start(None, pl_module)  # type: ignore[arg-type]
    return ema, pl_module


def test_average_with_warm_up() -> None:
    ema, pl_module = started(0.9)
    expected = 0.0
    for step in range(1, 200):
        update(ema, pl_module, float(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_average_without_warm_up() -> None:
    ema, pl_module = EMA(0.9, warmup=False), module(1.0)
    ema.on_fit_start(None, pl_module)  # type: ignore[arg-type]
    for _ in range(3):
        update(ema, pl_module, 2.0)
    assert ema.average["weight"].item() == pytest.approx(2 - 0.9**3, rel=1e-6)


def test_batches_between_updates_do_not_count() -> None:
    ema, pl_module = started(0.5)
    update(ema, pl_module, 1.0)
    before = ema.average["weight"].clone()
    ema.on_train_batch_end(None, pl_module)  # type: ignore[arg-type]
    assert torch.equal(before, ema.average["weight"]) and ema.updates == 1


def test_swapped_gives_the_average_and_brings_the_raw_weights_back() -> None:
    ema, pl_module = started(0.5)
    update(ema, pl_module, 8.0)
    average = ema.average["weight"].item()
    with ema.swapped(pl_module):  # type: ignore[arg-type]
        assert pl_module.ema_target.weight.item() == average != 8.0
        with ema.swapped(pl_module):  # type: ignore[arg-type]
            assert pl_module.ema_target.weight.item() == average
        assert pl_module.ema_target.weight.item() == average
    assert pl_module.ema_target.weight.item() == 8.0


def test_non_finite_weights_never_enter() -> None:
    ema, pl_module = started(0.5)
    update(ema, pl_module, 4.0)
    before = ema.average["weight"].clone()
    update(ema, pl_module, float("nan"))
    assert torch.equal(before, ema.average["weight"])


def test_state_continues() -> None:
    ema, pl_module = started(0.9)
    for value in (1.0, 2.0):
        update(ema, pl_module, value)
    again = EMA(0.9)
    again.load_state_dict(ema.state_dict())
    again.on_fit_start(None, pl_module)  # type: ignore[arg-type]
    update(ema, pl_module, 5.0)
    again._seen = pl_module.updates - 1
    again.on_train_batch_end(None, pl_module)  # type: ignore[arg-type]
    assert torch.equal(ema.average["weight"], again.average["weight"]) and again.updates == 3


def test_impossible_decay() -> None:
    with pytest.raises(ValueError, match="1.0"):
        EMA(1.0)


def test_further_decays_are_kept_beside_it_and_saved() -> None:
    alone, pl_module = started(0.9)
    several = EMA(0.5, also=[0.9])
    several.on_fit_start(None, pl_module)  # type: ignore[arg-type]
    for step in range(1, 30):
        update(alone, pl_module, float(step))
        several.on_train_batch_end(None, pl_module)  # type: ignore[arg-type]
    assert torch.equal(several.further[0.9]["weight"], alone.average["weight"])
    assert not torch.equal(several.average["weight"], alone.average["weight"])
    again = EMA(0.5, also=[0.9, 0.99])
    again.load_state_dict(several.state_dict())
    again.on_fit_start(None, pl_module)  # type: ignore[arg-type]
    assert torch.equal(again.further[0.9]["weight"], alone.average["weight"])
    assert torch.equal(again.further[0.99]["weight"], pl_module.ema_target.weight)
    with pytest.raises(ValueError, match="name one twice"):
        EMA(0.9, also=[0.9])
