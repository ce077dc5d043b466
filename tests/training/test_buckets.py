"""Batches of several sizes end to end: a tokenizer and a generator learn from them, draw any of them
and are measured in each.
"""

import json
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tessellar.callbacks.codebook_usage import CodebookUsage
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.card import Record
from tessellar.cli import evaluate, sample, train
from tessellar.data.sets.image_folder import ImageFolderData
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.mar import MAR
from tessellar.pipeline import load_generator
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.layout import Categorical, Continuous, grid_layout
from tessellar.tokenizers.llamagen import LlamaGenVQ
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.tokenizer_module import TokenizerModule
from tests.tiny.configs import tokenizer_run
from tests.tiny.pairs import GENERATORS
from tests.training.test_resume import Drawing, SaveAll, differences, everything

SIZES = ((16, 16), (16, 24), (24, 16))
LLAMA = partial(LlamaGen, width=16, depth=1, num_heads=2, num_classes=2, ffn_multiple_of=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of each shape, in two classes: bright ones and dark ones."""
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("buckets") / "pictures"
    for number in range(24):
        height, width = SIZES[number % 3]
        shade = 100 * (number % 2)
        pixels = generator.integers(shade, shade + 100, (height, width, 3), dtype=np.uint8)
        folder = root / ("dark", "bright")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def data(pictures: Path) -> ImageFolderData:
    return ImageFolderData(
        str(pictures),
        16,
        val_root=str(pictures),
        batch_size=4,
        num_workers=0,
        buckets=SIZES[1:],
    )


def tokenizer_module() -> TokenizerModule:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)
    loss = TokenizerLoss(Reconstruction(l1=1.0))
    return TokenizerModule(tokenizer, loss, optimizer=OptimizerSettings(lr=1e-2))


class Shapes(L.Callback):
    """Sizes and tokens of the batches of training and of validation."""

    def __init__(self) -> None:
        self.train: list[tuple[tuple[int, ...], int]] = []
        self.val: set[tuple[int, ...]] = set()

    def on_train_batch_end(self, trainer, module, outputs, batch, *_) -> None:
        self.train.append((tuple(batch["image"].shape[2:]), outputs["tokens"].shape[1]))

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_) -> None:
        self.val.add(tuple(batch["image"].shape[2:]))

    def on_validation_epoch_end(self, trainer, module) -> None:
        assert module.tokenizer.image_size == (16, 16)


@pytest.fixture(scope="module")
def exports(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer and a generator that were trained on buckets, two epochs each, as exports."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = tokenizer_module()
    generator = None
    for name in ("tokenizer", "generator"):
        module = tokenizer
        if name == "generator":
            module = generator = GeneratorModule(str(folder / "tokenizer"), LLAMA)
        made = data(pictures)
        module.check_data(made)
        watched = Shapes()
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            callbacks=[watched, CodebookUsage(every=2)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(module, made)
        assert {size for size, _ in watched.train} == watched.val == set(SIZES)
        assert all(count == h * w // 16 for (h, w), count in watched.train)
        assert module.tokenizer.image_size == (16, 16) and module.updates == 12
        module.export(folder / name, Record(title=name, data="pictures"))
    assert generator is not None
    return folder / "tokenizer", folder / "generator"


def test_one_table_of_positions_learns_from_every_size(pictures: Path) -> None:
    tokenizer = tokenizer_module().tokenizer
    assert isinstance(tokenizer, ViTVQ)
    for size in SIZES:
        tokenizer.take_size(size)
        tokenizer.zero_grad()
        images = torch.rand(2, 3, *size) * 2 - 1
        output = tokenizer(images)
        assert output.reconstruction.shape == images.shape
        assert output.tokens.shape == (2, tokenizer.layout.length)
        output.reconstruction.square().mean().backward()
        gradient = tokenizer.decoder.positions.grad
        assert gradient is not None and bool(gradient.abs().sum(-1).all())
        torch.testing.assert_close(
            tokenizer.eval().decode(tokenizer.encode(images)), output.reconstruction
        )


def logits(generator: LlamaGen, tokens: Tensor) -> Tensor:
    """Teacher-forced scores of one image of class 0."""
    scores = generator.score(tokens, Condition(ids=torch.tensor([0])))
    assert isinstance(scores, Logits)
    return scores.logits


def test_samples_of_each_size_follow_its_rows_and_columns(exports: tuple[Path, Path]) -> None:
    model = load_generator(exports[1])
    plain = model.sample([0, 1], output="uint8")
    for size in SIZES:
        model.take_size(size)
        assert model.sample([0, 1], output="uint8").shape == (2, 3, *size)
        assert model.image_size == size
    model.take_size((16, 16))
    assert torch.equal(model.sample([0, 1], output="uint8"), plain)
    # 4 x 6 and 6 x 4 are as many tokens, at other places.
    tokens = torch.arange(24)[None] % 16
    scores = []
    for size in SIZES[1:]:
        model.take_size(size)
        generator = model.generator.eval()
        assert isinstance(generator, LlamaGen)
        torch.nn.init.normal_(generator.output.weight, generator=torch.Generator().manual_seed(0))
        scores.append(logits(generator, tokens))
    assert scores[0].shape == scores[1].shape and not torch.allclose(*scores)


def test_a_generator_of_a_size_is_one_that_was_made_for_it() -> None:
    """Rotations, entities and the cache's places of a size that was taken are those of a new model."""
    layouts = [grid_layout(*grid, Categorical(16)) for grid in ((4, 4), (4, 6))]
    torch.manual_seed(0)
    first, second = (LLAMA(layout=layout).eval() for layout in layouts)
    torch.nn.init.normal_(first.output.weight)
    second.load_state_dict(first.state_dict())
    first.take_layout(layouts[1])
    tokens = torch.arange(24)[None] % 16
    assert torch.equal(logits(first, tokens), logits(second, tokens))
    with pytest.raises(UserError, match="LlamaGen predicts tokens of one layout"):
        first.take_layout(grid_layout(4, 6, Categorical(17)))


def test_convolutions_take_any_multiple_of_their_stride() -> None:
    torch.manual_seed(0)
    tokenizer = LlamaGenVQ(
        VectorQuantizer(16, 4), image_size=16, channels=32, multipliers=(1, 1), z_channels=4
    ).eval()
    before = tokenizer.encode(torch.zeros(1, 3, 16, 16))
    tokenizer.take_size((16, 24))
    assert tokenizer.layout.grid == (8, 12)
    assert tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, 16, 24))).shape == (1, 3, 16, 24)
    with pytest.raises(UserError, match="the stride 2 does not divide images of 15 x 16"):
        tokenizer.take_size((15, 16))
    tokenizer.take_size((16, 16))
    assert torch.equal(tokenizer.encode(torch.zeros(1, 3, 16, 16)), before)


def test_models_of_one_size_refuse_buckets_before_a_run_begins(pictures: Path) -> None:
    module = tokenizer_module()
    made = data(pictures)
    made.buckets = ((16, 16), (18, 16))
    with pytest.raises(UserError, match="patch_size 4 does not divide images of 18 x 16"):
        module.check_data(made)
    absolute = GENERATORS["MAR"](grid_layout(4, 4, Continuous(4)))
    assert isinstance(absolute, MAR)
    with pytest.raises(UserError, match="MAR predicts tokens of one layout"):
        absolute.take_layout(grid_layout(4, 6, Continuous(4)))


def test_a_resumed_run_on_buckets_is_the_uninterrupted_one(
    fit, pictures: Path, tmp_path: Path
) -> None:
    def run(*further: L.Callback, **options):
        module = tokenizer_module()
        ema = EMA(0.9)
        drawing = Drawing()
        callbacks = [ema, drawing, *further]
        trainer, losses = fit(module, 9, callbacks, data=data(pictures), **options)
        return everything(module, trainer, ema, drawing), losses

    whole, losses = run(SaveAll(tmp_path))
    resumed, rest = run(ckpt_path=tmp_path / "batch_4.ckpt")
    assert rest == losses[4:]
    assert not differences(whole, resumed)


def test_a_yaml_says_the_buckets_and_the_run_what_they_hold(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tokenizer_run(4, validate_every=2, save_every=4)
    options = {"root": str(pictures), "size": 16, "batch_size": 4, "val_root": str(pictures)}
    options |= {"buckets": [[16, 24], [24, 16]], "num_workers": 0}
    config["data"] = {"class_path": "tessellar.data.ImageFolderData", "init_args": options}
    config["log_every"] = 1
    Path("run.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", "run.yaml", "--name", "mixed"])
    said = Path("runs/mixed/log.txt").read_text()
    assert "in buckets 16 x 16: 8, 16 x 24: 8, 24 x 16: 8" in said
    assert Path("runs/mixed/export/model.safetensors").exists()
    assert list(Path("runs/mixed/pictures").glob("reconstructions_*.png"))


def test_commands_draw_and_measure_a_size(
    exports: tuple[Path, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--device", "cpu", "--per-class", "1", "--size", "16", "24"]
    sample.main([str(exports[1]), *words, "--out", "s"])
    (first, *_) = sorted(Path("s").glob("0*.png"))
    assert Image.open(first).size == (24, 16)
    assert json.loads(Path("s/samples.json").read_text())["size"] == [16, 24]
    sets = ["--data", "tessellar.data.ImageFolderData", "--data.root", str(pictures)]
    sets += ["--data.val_root", str(pictures), "--data.size", "16", "--data.num_workers", "0"]
    measured = ["--extractor", "none", "--size", "24", "16", "--out", "r.json", "--device", "cpu"]
    evaluate.main(["model", str(exports[0]), *sets, *measured])
    record = json.loads(Path("r.json").read_text())
    assert record["samples"]["size"] == "24 x 16" and record["metrics"]["PSNR"] > 5
    with pytest.raises(UserError, match="--size is"):
        sample.main([str(exports[1]), *words, "2", "--out", "t"])
