"""On an accelerator no step waits for the device: what is not finite is left out there, and counted later."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessellar.callbacks.ema import EMA
from tessellar.training.base import NonFiniteGradients, TrainingModule


def with_bad_batches(module, bad: set[int]):
    """A module whose loss is NaN in the batches `bad`."""
    usual = module.model.generator.loss

    def loss(*inputs: Any) -> dict[str, Any]:
        terms = usual(*inputs)
        return {n: t * torch.nan if module.batches in bad else t for n, t in terms.items()}

    module.model.generator.loss = loss
    return module


@pytest.mark.parametrize("bad", [set(), {0}, {2, 3}, {5}])
def test_updates_that_the_device_leaves_out_are_those_that_the_host_would(
    make, fit, monkeypatch: pytest.MonkeyPatch, bad: set[int]
) -> None:
    host = with_bad_batches(make.generator_module(), bad)
    trainer, losses = fit(host, 6)
    moments = trainer.optimizers[0].state_dict()["state"]
    monkeypatch.setattr(TrainingModule, "decides_on_device", lambda *_: True)
    device = with_bad_batches(make.generator_module(), bad)
    trainer, again = fit(device, 6)
    assert str(again) == str(losses)  # NaN is not equal to itself
    assert device.skipped == host.skipped == len(bad) and device.updates == host.updates == 6
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, device.state_dict()[name]), name
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in state.items())


def test_too_many_in_a_row_end_the_run_one_update_later(
    make, fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingModule, "decides_on_device", lambda *_: True)
    module = with_bad_batches(make.generator_module(max_skipped=2), {1, 2, 3})
    with pytest.raises(NonFiniteGradients, match="2 updates in a row .* the last is update 2"):
        fit(module, 6)
    assert module.updates == 3


def test_nothing_in_a_step_is_read_on_the_host(make, fit) -> None:
    """On the meta device there is nothing to read: `.item()`, `bool(tensor)` and indexing by a mask raise."""
    module = make.generator_module()
    trainer, _ = fit(module, 1)
    module.to("meta")
    optimizer = module.players[0].optimizers[0]
    steps: list[int] = []
    optimizer.step = lambda *_, **__: steps.append(1)  # no fused kernel for this device
    module.log_train = lambda *_: None
    module.tokens_of = lambda batch: batch["tokens"]  # autocast knows no such device
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros((), device="meta"))
    tokens = torch.zeros(4, 16, dtype=torch.int64, device="meta")
    label = torch.zeros(4, dtype=torch.int64, device="meta")
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
    output = module.training_step({"tokens": tokens, "label": label}, 0)
    assert output["loss"].is_meta and steps == [1]
    assert all(p.grad is None for p in module.players[0].parameters)
    ema = EMA(0.9)
    holder = SimpleNamespace(ema_target=module.ema_target, updates=0)
    ema.on_fit_start(None, holder)  # type: ignore[arg-type]
    holder.updates = 1
    ema.on_train_batch_end(None, holder)  # type: ignore[arg-type]
    assert ema.updates == 1
