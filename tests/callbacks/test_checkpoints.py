"""Checkpoints: when they are written, which is best, and that a failed write leaves the one before it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.errors import UserError


class Trainer(SimpleNamespace):
    """Saves the number of updates as text; fails where it is told to."""

    def __init__(self, module: SimpleNamespace) -> None:
        state = SimpleNamespace(fn="fit")
        super().__init__(
            is_global_zero=True,
            sanity_checking=False,
            callback_metrics={},
            state=state,
            full=False,
            module=module,
        )
        self.lightning_module = torch.nn.Linear(1, 1)
        self.loggers = []
        self.fit_loop = SimpleNamespace(_data_fetcher=None)

    def save_checkpoint(self, path: Path) -> None:
        path.write_text("" if self.full else str(self.module.updates))
        if self.full:
            raise OSError("No space left on device")


@pytest.fixture
def parts(tmp_path: Path):
    module = SimpleNamespace(updates=0, best_by=("val/loss", "min"))
    callback = Checkpoints(tmp_path, 2, "val/loss", "min")
    trainer = Trainer(module)
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    return callback, trainer, module


def step(callback, trainer, module, count: int = 1) -> None:
    for _ in range(count):
        module.updates += 1
        for _ in range(2):  # two batches an update
            callback.on_train_batch_end(trainer, module)


def content(callback: Checkpoints) -> dict[str, str]:
    return {path.name: path.read_text() for path in callback.folder.iterdir()}


def test_last_and_the_one_before(parts) -> None:
    callback, trainer, module = parts
    step(*parts)
    assert content(callback) == {}
    step(*parts, count=4)
    assert content(callback) == {"previous.ckpt": "2", "last.ckpt": "4"}
    callback.on_train_end(trainer, module)
    assert content(callback) == {"previous.ckpt": "4", "last.ckpt": "5"}
    callback.on_train_end(trainer, module)
    assert content(callback)["previous.ckpt"] == "4"  # nothing new to save


def test_a_failed_write_leaves_the_previous_one(parts) -> None:
    callback, trainer, _ = parts
    step(*parts, count=2)
    trainer.full = True
    with pytest.raises(
        UserError,
        match="last.ckpt could not be written: No space.*Last whole checkpoint: .*last.ckpt",
    ):
        step(*parts, count=2)
    assert content(callback) == {"last.ckpt": "2"}  # and the space is free again


@pytest.mark.parametrize(
    ("mode", "expected"), [("min", ["1", "2", "2", "2"]), ("max", ["1", "1", "3", "3"])]
)
def test_best(parts, mode, expected: list[str]) -> None:
    callback, trainer, module = parts
    callback.mode, best = mode, []
    for value in (0.5, 0.4, 0.6, 0.5):
        step(*parts)
        trainer.callback_metrics["val/loss"] = value
        callback.on_validation_end(trainer, module)
        best.append((callback.folder / "best.ckpt").read_text())
    assert best == expected
    again = Checkpoints(callback.folder, 2, "val/loss", mode)
    again.load_state_dict(callback.state_dict())
    assert again.best == callback.best


def test_other_metrics_are_looked_at_between_validations_and_none_outside_of_training(
    parts,
) -> None:
    callback, trainer, module = parts
    trainer.callback_metrics |= {"val/loss": 0.1, "val/distance": 0.1}
    step(*parts)
    assert "best.ckpt" not in content(callback)
    callback.metric = "val/distance"
    step(*parts)
    assert content(callback)["best.ckpt"] == "2"
    trainer.state.fn, trainer.callback_metrics["val/distance"] = "validate", 0.0
    callback.on_validation_end(trainer, module)
    assert callback.best == 0.1


def test_impossible_interval(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every 0"):
        Checkpoints(tmp_path, 0, "val/loss", "min")


def test_a_metric_that_no_validation_measures_is_said_once(parts, caplog) -> None:
    callback, trainer, module = parts
    callback.metric = "val/FIDD"
    trainer.callback_metrics = {"val/loss": torch.tensor(1.0)}
    with caplog.at_level("WARNING", "tessellar"):
        callback.on_validation_end(trainer, module)
        callback.on_validation_end(trainer, module)
    assert caplog.messages == [
        "the validation did not measure val/FIDD but val/loss: no best.ckpt yet"
    ]
