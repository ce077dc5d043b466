"""The FID callback: when it measures, with which weights, and what it leaves behind."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tessellar.callbacks.ema import EMA
from tessellar.callbacks.fid import FID
from tessellar.callbacks.pictures import Pictures
from tessellar.data.sets.shapes import ShapesData
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.metrics_file import MetricsFile


class Brush(ImageGenerator):
    """One weight; images are noise of the seed around it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conditioner, self.generator = ClassConditioner(10), nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.generator.weight)

    def sample_tokens(
        self, condition: Condition, sampling: Any, seeds: Any, recorder: Any = None
    ) -> Tensor:
        noise = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return 0.2 * torch.stack(noise) + self.generator.weight[0, 0]

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens


class Painter(L.LightningModule):
    """Each update adds 0.1 to the weight of the brush (or of the tokenizer's first bias)."""

    def __init__(self, model: ImageGenerator | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.updates = 0
        if model is not None:
            self.model = model
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.ema_target = nn.Module() if model is None else model.generator
        self.ema_target = tokenizer or self.ema_target
        self.seen: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def training_step(self, batch: Any, _: int) -> None:
        self.optimizers().step()  # type: ignore[union-attr, call-arg]
        self.seen.append(float(torch.rand(())))
        with torch.no_grad():
            next(iter(self.ema_target.parameters())).flatten()[0] += 0.1
        self.updates += 1


DATA = {"size": 32, "length": 40, "val_length": 20, "batch_size": 10}


def fit(module: Painter, tmp_path: Path, callbacks: list[L.Callback], epochs: int = 2) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=MetricsFile(tmp_path / "metrics.csv"),
        callbacks=callbacks,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        log_every_n_steps=1000,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(module, ShapesData(**DATA))
    return trainer


def records(tmp_path: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "evaluations").iterdir())]


@pytest.fixture
def settings(tiny_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {"extractor": str(tiny_file), "num_samples": 20, "cache": str(tmp_path / "cache")}


def test_every_epoch_is_measured_logged_and_monitored(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    best = ModelCheckpoint(
        tmp_path / "best", "{step}-{val/distance:.3f}", monitor="val/distance", mode="min"
    )
    trainer = fit(Painter(Brush()), tmp_path, [FID(**settings), best])
    values = [record["metrics"]["FD(tiny)"] for record in records(tmp_path)]
    assert len(values) == 2 and values[0] != values[1]
    assert float(trainer.callback_metrics["val/distance"]) == pytest.approx(values[1])
    assert float(trainer.callback_metrics["val/FD(tiny)"]) == pytest.approx(values[1])
    assert best.best_model_score is not None and float(best.best_model_score) == pytest.approx(
        min(values)
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8] and float(
        rows[0]["val/evaluation_seconds"]
    ) > 0
    assert [float(row["val/distance"]) for row in rows] == [
        pytest.approx(value, rel=1e-5) for value in values
    ]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_it_counts_updates(settings: dict[str, Any], tmp_path: Path) -> None:
    fit(Painter(Brush()), tmp_path, [FID(**settings, every_n_epochs=None, every_n_updates=3)])
    assert [record["samples"]["updates"] for record in records(tmp_path)] == [3, 6]


def test_it_measures_averaged_weights_and_gives_the_raw_ones_back(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    seen = []

    class Watched(Brush):
        def sample_tokens(
            self, condition: Condition, sampling: Any, seeds: Any, recorder: Any = None
        ) -> Tensor:
            seen.append(self.generator.weight.item())
            return super().sample_tokens(condition, sampling, seeds)

    ema, module = EMA(0.5), Painter(Watched())
    fit(module, tmp_path, [FID(**settings), ema], epochs=1)
    assert seen == [pytest.approx(ema.average["weight"].item())]
    assert module.ema_target.weight.item() == pytest.approx(0.4) != seen[0]  # type: ignore[operator]
    assert records(tmp_path)[0]["samples"]["weights"] == "ema"


def test_training_draws_the_same_numbers_with_and_without_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, measured = Painter(Brush()), Painter(Brush())
    fit(plain, tmp_path / "a", [])
    fit(measured, tmp_path / "b", [FID(**settings, every_n_epochs=None, every_n_updates=1)])
    assert plain.seen == measured.seen and len(set(plain.seen)) == 8


def test_a_tokenizer_gets_rfd_and_psnr(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 4, 16, 1, 1, 2)
    settings |= {"num_samples": 1000, "metrics": ["fd", "paired"]}
    fit(Painter(tokenizer=tokenizer), tmp_path, [FID(**settings)], epochs=1)
    (record,) = records(tmp_path)
    assert set(record["metrics"]) == {"rFD(tiny)", "PSNR", "SSIM"}
    assert record["reference"] == {**record["reference"], "name": "shapes val", "images": 20}


def test_what_is_missing_is_said_before_training(settings: dict[str, Any], tmp_path: Path) -> None:
    for change, message in (
        ({"extractor": "nowhere.safetensors"}, "does not exist"),
        ({"metrics": ["sfd"]}, "only the Inception network"),
        ({"reference": str(tmp_path / "none.npz")}, "none.npz"),
    ):
        module = Painter(Brush())
        with pytest.raises(UserError, match=message):
            fit(module, tmp_path, [FID(**{**settings, **change})])
        assert module.updates == 0
    with pytest.raises(ValueError, match="either every_n_epochs or every_n_updates"):
        FID(every_n_updates=3)


def test_pictures_at_the_end(tmp_path: Path) -> None:
    fit(Painter(Brush()), tmp_path, [Pictures(samples=3, neighbours=2), Logged()], epochs=1)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "curves.png",
        "neighbours.png",
    ]


class Logged(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.logger.log_metrics({"train/loss": 1.0}, step=1)  # type: ignore[union-attr]
