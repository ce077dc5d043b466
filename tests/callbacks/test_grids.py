"""Grids: what stands where in the picture, and that it goes to the run's folder and the loggers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from tessellar.callbacks.grids import Grids
from tessellar.images import to_uint8
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.sampling.grid import picture_grid
from tessellar.sampling.settings import Sampling
from tessellar.training.runs import LateTensorBoard


class Pictures(LateTensorBoard):
    """The run's own logger, but for what it does with a picture."""

    def __init__(self) -> None:
        self.shown: dict[tuple[str, int], tuple[int, ...]] = {}

    def log_picture(self, name: str, image: torch.Tensor, step: int) -> None:
        self.shown[name, step] = tuple(image.shape)


def make(tmp_path: Path, columns: int):
    (tmp_path / "run").mkdir()
    trainer = SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        loggers=[Pictures(), object()],
        callbacks=[],
    )
    return Grids(SimpleNamespace(folder=tmp_path / "run"), Sampling(), columns), trainer  # type: ignore[arg-type]


def picture(tmp_path: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(tmp_path / "run" / "pictures" / name))


def grey(levels: list[float]) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_originals_stand_above_their_reconstructions(tmp_path: Path) -> None:
    grids, trainer = make(tmp_path, columns=2)
    images, reconstruction = grey([-1.0, -0.5, 0.0, 0.5]), grey([1.0, 0.75, 0.25, 2.0])
    module = SimpleNamespace(updates=7)
    grids.on_validation_batch_end(
        trainer, module, {"reconstruction": reconstruction}, {"image": images}, 0
    )  # type: ignore[arg-type]
    grids.on_validation_batch_end(trainer, module, {"reconstruction": images}, {"image": images}, 1)  # type: ignore[arg-type]
    grids.on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    rows = [images[:2], reconstruction[:2], images[2:], reconstruction[2:]]
    labels = ["original", "reconstruction"] * 2
    expected = picture_grid([list(to_uint8(row)) for row in rows], row_labels=labels)
    shown = picture(tmp_path, "reconstructions_0000007.png")
    assert np.array_equal(shown, expected.permute(1, 2, 0).numpy())
    assert trainer.loggers[0].shown == {("reconstructions", 7): tuple(expected.shape)}


class Model:
    """Paints the class: 0 black, 1 white."""

    conditioner = ClassConditioner(2)
    class_names = ("night", "day")

    def class_condition(self, labels: list[int]) -> Condition:
        return self.conditioner.of_labels(torch.tensor(labels))

    def sample(self, condition: Condition, sampling: Sampling, seeds: range) -> torch.Tensor:
        assert condition.ids is not None
        self.seeds = list(seeds)
        return grey([2.0 * int(label) - 1 for label in condition.ids])


def test_samples_are_a_row_a_class_with_fixed_seeds(tmp_path: Path) -> None:
    grids, trainer = make(tmp_path, columns=3)
    module = SimpleNamespace(updates=1, model=Model())
    grids.on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    rows = [to_uint8(grey([level] * 3)) for level in (-1.0, 1.0)]
    expected = picture_grid([list(row) for row in rows], row_labels=["night", "day"])
    shown = picture(tmp_path, "samples_0000001.png")
    assert np.array_equal(shown, expected.permute(1, 2, 0).numpy())
    assert module.model.seeds == list(range(6))


def test_nothing_is_drawn_in_the_sanity_check(tmp_path: Path) -> None:
    grids, trainer = make(tmp_path, columns=3)
    trainer.sanity_checking = True
    grids.on_validation_epoch_end(trainer, SimpleNamespace(updates=0, model=Model()))  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "pictures").exists()
