"""The FID callback: when it measures, with which weights, and what it leaves behind."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from tessellar.callbacks.ema import EMA
from tessellar.callbacks.fid import FID
from tessellar.callbacks.pictures import Pictures
from tessellar.data import CachedTokensData
from tessellar.data.sets.shapes import ShapesData
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.evaluation.references import references_from, save_statistics
from tessellar.evaluation.sources import DatasetImages
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.metrics_file import MetricsFile


class Weight(nn.Linear):
    draws_alone = True  # as generators say


class Brush(ImageGenerator):
    """One weight; images are noise of the seed around it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conditioner, self.generator = ClassConditioner(10), Weight(1, 1, bias=False)
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


def fit(
    module: Painter, tmp_path: Path, callbacks: list[L.Callback], epochs: int = 2, data: Any = None
) -> L.Trainer:
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
    trainer.fit(module, data or ShapesData(**DATA))
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


class Counting(Brush):
    """Counts the images that it paints; a guidance scale of 1 makes them paler."""

    def __init__(self) -> None:
        super().__init__()
        self.painted: list[tuple[float, int]] = []

    def sample_tokens(
        self, condition: Condition, sampling: Any, seeds: Any, recorder: Any = None
    ) -> Tensor:
        scale = sampling.guidance.scale
        self.painted += [(scale, seed) for seed in seeds]
        return scale * super().sample_tokens(condition, sampling, seeds)


@pytest.fixture
def second_file(tmp_path: Path, tiny: Any) -> str:
    facts = replace(tiny.facts, name="second", num_classes=0)
    torch.manual_seed(5)
    state = network_of(facts).state_dict()
    path = tmp_path / "second.safetensors"
    save_file(state, path, metadata=facts.to_metadata())
    return str(path)


def test_networks_guidance_weights_and_seeds_in_one_measurement(
    settings: dict[str, Any], second_file: str, tmp_path: Path
) -> None:
    settings["extractor"] = [settings["extractor"], second_file]
    fid = FID(**settings, guidance=[1.0, 2.0], weights="both", sets=2)
    model = Counting()
    trainer = fit(Painter(model), tmp_path, [fid, EMA(0.5)], epochs=1)
    expected = [(scale, seed) for scale in (1, 2) for seed in range(40)]
    assert model.painted == expected * 2  # two networks, once; averaged weights, raw ones
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for network in ("tiny", "second"):
        for label in ("guidance 1", "guidance 2", "guidance 1 raw", "guidance 2 raw"):
            assert values[f"val/FD({network}) {label}"] > 0
            assert values[f"val/FD({network}) {label} noise"] > 0
    averaged = [values[f"val/FD(tiny) guidance {scale}"] for scale in (1, 2)]
    assert values["val/distance"] == pytest.approx(min(averaged))
    names = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert len(names) == 8 and "00000004-guidance-2-raw-seed20.json" in names
    one = json.loads((tmp_path / "evaluations" / "00000004-guidance-1.json").read_text())
    two = json.loads((tmp_path / "evaluations" / "00000004-guidance-1-seed20.json").read_text())
    mean = (one["metrics"]["FD(tiny)"] + two["metrics"]["FD(tiny)"]) / 2
    assert values["val/FD(tiny) guidance 1"] == pytest.approx(mean)


def test_a_resumed_run_takes_what_was_measured(settings: dict[str, Any], tmp_path: Path) -> None:
    first = Counting()
    again = Counting()
    other = Counting()
    trainers = []
    for model in (first, again):
        trainers.append(fit(Painter(model), tmp_path, [FID(**settings)]))
    assert len(first.painted) == 40 and again.painted == []
    found = [float(trainer.callback_metrics["val/distance"]) for trainer in trainers]
    assert found[0] == found[1]
    nn.init.constant_(other.generator.weight, 0.05)  # other weights at the same updates
    fit(Painter(other), tmp_path, [FID(**settings)])
    assert len(other.painted) == 40


def test_measuring_keeps_to_its_share_of_the_run(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fid = FID(**settings, share=0.001, free_seconds=0.0)
    with caplog.at_level("INFO", logger="tessellar.callbacks.fid"):
        fit(Painter(Brush()), tmp_path, [fid], epochs=4)
    assert len(records(tmp_path)) == 1
    own = [record for record in caplog.records if record.name == "tessellar.callbacks.fid"]
    said = [record.getMessage() for record in own]
    assert "is left out: all of them took" in said[0]
    assert "% of the run's time (at most 0.1 %); 3 were left out" in said[-1]
    again = FID(**settings, share=0.001, free_seconds=0.0)
    again.load_state_dict(fid.state_dict())
    fit(Painter(Brush()), tmp_path / "again", [again], epochs=1)
    assert not (tmp_path / "again" / "evaluations").exists()


def test_a_run_ends_where_the_distance_gets_no_better(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    class Idle(Painter):
        def training_step(self, batch: Any, _: int) -> None:
            self.optimizers().step()  # type: ignore[union-attr, call-arg]
            self.updates += 1

    module = Idle(Brush())
    fid = FID(**settings, patience=2)
    fit(module, tmp_path, [fid], epochs=6)
    assert module.updates == 3 * 4  # the first one, and two that were no better
    assert fid.state_dict()["without_better"] == 2


def test_a_run_on_cached_tokens_needs_no_images(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 8, 16, 1, 1, 2).eval()
    data = ShapesData(**DATA)
    for part, dataset in (("train", data.train_dataset()), ("val", data.val_dataset())):
        encode_dataset(tokenizer, dataset, tmp_path / "tokens" / part, name="shapes")
    kept = references_from(DatasetImages(data.val_dataset(), "shapes"), [tiny_of(settings)])
    save_statistics(kept[0], tmp_path / "ref.npz")
    cached = CachedTokensData(str(tmp_path / "tokens"), batch_size=10)
    fid = FID(**settings, reference=str(tmp_path / "ref.npz"))
    fit(Painter(Brush()), tmp_path, [fid], epochs=1, data=cached)
    (record,) = records(tmp_path)
    assert record["metrics"]["FD(tiny)"] > 0 and record["samples"]["labels"] == "balanced"
    with pytest.raises(UserError, match="name the images too"):
        fit(Painter(Brush()), tmp_path, [FID(**settings)], epochs=1, data=cached)


def tiny_of(settings: dict[str, Any]) -> Any:
    return load_extractor(settings["extractor"])


def test_guidance_is_of_generators(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 4, 16, 1, 1, 2)
    with pytest.raises(UserError, match="guidance is of generators"):
        fit(Painter(tokenizer=tokenizer), tmp_path, [FID(**settings, guidance=[2.0])])


def test_pictures_at_the_end(tmp_path: Path) -> None:
    fit(Painter(Brush()), tmp_path, [Pictures(samples=3, neighbours=2), Logged()], epochs=1)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "curves.png",
        "neighbours.png",
    ]


class Logged(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.logger.log_metrics({"train/loss": 1.0}, step=1)  # type: ignore[union-attr]
