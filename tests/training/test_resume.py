"""A resumed run equals the uninterrupted one bit for bit, wherever it was interrupted."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from tessellar.callbacks.ema import EMA
from tessellar.data.sets.shapes import ShapesData
from tessellar.errors import UserError
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.training import random_state
from tessellar.training.base import STATE_KEY


class Drawing(L.Callback):
    """Draws global random numbers of every kind in training and in validation, as a user's own part might."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.drawn = [(random.random(), float(np.random.normal()), float(torch.rand(())))]

    def on_validation_batch_end(self, *_: Any) -> None:
        self.unused = random.random(), np.random.rand(), torch.rand(3)


class SaveAll(L.Callback):
    """A checkpoint after every batch, `batch_<n>.ckpt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch_{pl_module.batches}.ckpt")


def tokenizer_module(make):
    """With a discriminator, two optimizers of its own, dead codes that are restarted at random, accumulation."""
    module = make.tokenizer_module(PatchGAN(8, 1), accumulate=2)
    quantizer = module.tokenizer.quantizer
    quantizer.init_step, quantizer.restart_every = 2, 3
    return module


def generator_module(make):
    return make.generator_module()


def everything(module, trainer: L.Trainer, ema: EMA, drawing: Drawing) -> dict[str, Any]:
    optimizers = [o.state_dict()["state"] for o in trainer.optimizers]
    counts = [
        module.batches,
        module.updates,
        module.skipped,
        module.epoch,
        module.epoch_samples,
        trainer.global_step,
    ]
    return {
        "weights": module.state_dict(),
        "ema": {**ema.average, "updates": ema.updates},
        "optimizers": {
            f"{i}.{p}.{n}": v
            for i, s in enumerate(optimizers)
            for p, e in s.items()
            for n, v in e.items()
        },
        "counts": dict(enumerate(counts)),
        "random": dict(enumerate(drawing.drawn)),
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = []
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            same = (
                torch.equal(value, b[part][name])
                if isinstance(value, torch.Tensor)
                else value == b[part][name]
            )
            found += [] if same else [f"{part} {name}"]
    return found


def trained(
    fit, make, factory, steps: int, folder: Path | None = None, workers: int = 0, **options: Any
):
    module, ema, drawing = factory(make), EMA(0.9), Drawing()
    data = ShapesData(size=16, length=40, val_length=8, batch_size=8, num_workers=workers)
    callbacks = [ema, drawing, *([SaveAll(folder)] if folder else [])]
    settings = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer, losses = fit(
        module, steps, callbacks, data=data, num_sanity_val_steps=0, **settings, **options
    )
    return everything(module, trainer, ema, drawing), losses


@pytest.mark.parametrize(
    ("factory", "steps", "batches"),
    [(tokenizer_module, 6, (1, 3, 4, 5, 10)), (generator_module, 11, range(1, 11))],
)
def test_a_run_resumed_after_any_batch_equals_the_uninterrupted_one(
    fit, make, tmp_path: Path, factory, steps: int, batches: Sequence[int]
) -> None:
    """5 batches an epoch, a validation every 3: inside an epoch, at its end, at a validation, inside an update of 2."""
    whole, losses = trained(fit, make, factory, steps, tmp_path)
    for batch in batches:
        resumed, rest = trained(
            fit, make, factory, steps, ckpt_path=tmp_path / f"batch_{batch}.ckpt"
        )
        assert rest == losses[batch:], f"losses after batch {batch}"
        assert differences(whole, resumed) == [], f"after batch {batch}"


@pytest.mark.parametrize("batch", [3, 5])
def test_workers_that_read_ahead_change_nothing(fit, make, tmp_path: Path, batch: int) -> None:
    whole, losses = trained(fit, make, generator_module, 7, tmp_path)
    path = tmp_path / f"batch_{batch}.ckpt"
    resumed, rest = trained(fit, make, generator_module, 7, workers=2, ckpt_path=path)
    assert rest == losses[batch:] and differences(whole, resumed) == []


def test_data_that_shrank_is_refused(fit, make, tmp_path: Path) -> None:
    trained(fit, make, generator_module, 4, tmp_path)
    data = ShapesData(size=16, length=24, val_length=8, batch_size=8)
    with pytest.raises(UserError, match="at sample 32 of an epoch; shapes now has 24"):
        fit(make.generator_module(), 6, data=data, ckpt_path=tmp_path / "batch_4.ckpt")


def test_the_random_numbers_of_a_checkpoint_are_plain_data(fit, make, tmp_path: Path) -> None:
    trained(fit, make, generator_module, 1, tmp_path)
    (state,) = torch.load(tmp_path / "batch_1.ckpt", weights_only=True)[STATE_KEY]["random"]
    draws = []
    for _ in range(2):
        random_state.restore(state)
        draws.append((random.random(), np.random.normal(), float(torch.rand(()))))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_with_another_number_of_processes_the_first_keeps_its_stream(
    rank: int, monkeypatch
) -> None:
    """Other processes get streams of their own, the same in every such resume."""
    states, draws = (
        [random_state.capture()] * 3,
        [],
    )  # of a run with three processes, resumed by two
    monkeypatch.setattr(random_state.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(random_state.distributed, "rank", lambda: rank)
    for _ in range(2):
        random_state.restore_own(states)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    random_state.restore(states[0])
    original = (random.random(), float(np.random.rand()), float(torch.rand(())))
    assert draws[0] == draws[1] and (draws[0] == original) is (rank == 0)


@pytest.mark.parametrize("stops", [(3, 5, 7, 10), (2, 7, 10, 12), (5, 10), (4, 15)])
def test_a_run_resumed_many_times_equals_the_uninterrupted_one(
    fit, make, tmp_path: Path, stops: Sequence[int]
) -> None:
    """Each part saves what the next one starts from; they begin and end at ends of epochs (5, 10, 15) or cross them."""
    whole, losses = trained(fit, make, generator_module, 17)
    path = None
    for start, stop in zip((0, *stops), (*stops, 17), strict=True):
        resumed, part = trained(
            fit, make, generator_module, stop + (stop < 17), tmp_path, ckpt_path=path
        )
        assert part[: stop - start] == losses[start:stop], f"{start} to {stop}"
        path = tmp_path / f"batch_{stop}.ckpt"
    assert differences(whole, resumed) == []
