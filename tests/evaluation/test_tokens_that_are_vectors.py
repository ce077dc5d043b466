"""Bits and channels in a whole run: its distances, its grids, its use of codes, and its cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor

from tessellar.callbacks.codebook_usage import CodebookUsage
from tessellar.callbacks.fid import FID
from tessellar.callbacks.grids import Grids
from tessellar.data import CachedTokensData, ImageDataModule
from tessellar.data.sets.shapes import ShapesData
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.models.bar import BAR
from tessellar.models.bitdance import BitDance
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.processes.flow import EulerMaruyamaToData
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.bar_fsq import BARFSQ
from tessellar.tokenizers.bitdance import BinaryAutoencoder
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.open_magvit2 import OpenMAGVIT2
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.tokenbridge import PostQuantized
from tessellar.training.base import TrainingModule
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.tokenizer_module import TokenizerModule

SIZE = 32  # pixels, in 4 x 4 tokens
CNN: dict[str, Any] = {"channels": 32, "multipliers": (1, 1, 1, 1), "num_res_blocks": 1}
DATA: dict[str, Any] = {"size": SIZE, "length": 24, "val_length": 12, "batch_size": 6}
SMALL: dict[str, Any] = {"num_classes": 10, "dropout": 0.0}


def bar_fsq() -> BARFSQ:
    return BARFSQ(BinaryFSQ(6), SIZE, 8, 16, 1, 2, 2.0, 16, 1, 2)


def autoencoder() -> BinaryAutoencoder:
    return BinaryAutoencoder(LFQ(6, 3, form="bits"), SIZE, **CNN)


def quantised() -> PostQuantized:
    return PostQuantized(KLVAE(GaussianBottleneck(4), SIZE, **CNN), levels=5)


def magvit() -> OpenMAGVIT2:
    return OpenMAGVIT2(LFQ(5, split=(2, 3)), SIZE, **CNN)


def bar(layout: Layout) -> BAR:
    return BAR(layout, 16, 1, 2, head_width=16, head_depth=1, **SMALL)


def bitdance(layout: Layout) -> BitDance:
    sizes: dict[str, Any] = {"head_width": 16, "head_depth": 1, "head_groups": 1, "head_dim": 8}
    return BitDance(layout, 16, 1, 2, patch=2, num_classes=10, class_tokens=2, **sizes)


def tokenbridge(layout: Layout) -> TokenBridge:
    sizes: dict[str, Any] = {"head_width": 16, "head_depth": 1, "head_heads": 2, "buffer": 2}
    return TokenBridge(layout, 16, 1, 2, steps=4, **sizes, **SMALL)


def open_magvit2(layout: Layout) -> OpenMAGVIT2AR:
    return OpenMAGVIT2AR(layout, 16, 1, 2, 1, ffn_multiple_of=8, **SMALL)


@dataclass(frozen=True)
class Kind:
    """A generator on a tokenizer whose tokens have `columns` values each."""

    tokenizer: Callable[[], Tokenizer]
    generator: Callable[[Layout], Generator]
    columns: int
    sampling: Sampling = Sampling()


KINDS = {
    "masked bits": Kind(bar_fsq, bar, 6),
    "diffused bits": Kind(autoencoder, bitdance, 6, Sampling(flow=EulerMaruyamaToData(3))),
    "channels": Kind(quantised, tokenbridge, 4),
    "sub-tokens": Kind(magvit, open_magvit2, 2),
}


def tokenizer(kind: Kind) -> Tokenizer:
    torch.manual_seed(0)
    return kind.tokenizer().eval()


def generator_module(kind: Kind) -> GeneratorModule:
    torch.manual_seed(1)
    return GeneratorModule(tokenizer(kind), kind.generator)


def fit(module: TrainingModule, data: ImageDataModule, folder: Path, *callbacks: Any) -> L.Trainer:
    """Two epochs."""
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(module, data)
    return trainer


def watched(module: TrainingModule, sampling: Sampling, tiny_file: Path, folder: Path) -> L.Trainer:
    """A run on shapes with all that watches a run."""
    run: Any = SimpleNamespace(folder=folder)
    measuring = FID(
        str(tiny_file), num_samples=10, sampling=sampling, cache=str(folder / "cache"), share=1.0
    )
    watching = (measuring, Grids(run, sampling, columns=2), CodebookUsage(every=2, warn_below=0))
    return fit(module, ShapesData(**DATA), folder, *watching)


def checked(trainer: L.Trainer, columns: int, picture: Path) -> None:
    """What such a run leaves behind."""
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/FD(tiny)"] == found["val/distance"] > 0
    for stage in ("train", "val"):
        assert 0 < found[f"{stage}/codebook_least_usage"] <= found[f"{stage}/codebook_usage"] <= 1
        assert found[f"{stage}/codebook_least_perplexity"] >= 1
        assert 0 <= found[f"{stage}/codebook_least_factor"] < columns
    with Image.open(picture) as shown:
        assert shown.width >= 2 * SIZE and shown.height > SIZE


@pytest.mark.parametrize("name", KINDS)
def test_a_generator_of_vectors_is_measured_shown_and_counted(
    name: str, tiny_file: Path, tmp_path: Path
) -> None:
    kind = KINDS[name]
    trainer = watched(generator_module(kind), kind.sampling, tiny_file, tmp_path)
    checked(trainer, kind.columns, tmp_path / "pictures" / "samples_0000008.png")


@pytest.mark.parametrize("name", ["masked bits", "diffused bits", "sub-tokens"])
def test_a_tokenizer_of_vectors_is_measured_shown_and_counted(
    name: str, tiny_file: Path, tmp_path: Path
) -> None:
    kind = KINDS[name]
    module = TokenizerModule(tokenizer(kind), TokenizerLoss(Reconstruction()))
    trainer = watched(module, kind.sampling, tiny_file, tmp_path)
    checked(trainer, kind.columns, tmp_path / "pictures" / "reconstructions_0000008.png")


def encoded(kind: Kind, folder: Path) -> str:
    data = ShapesData(**DATA)
    for part, dataset in (("train", data.train_dataset()), ("val", data.val_dataset())):
        encode_dataset(tokenizer(kind), dataset, folder / part, name="shapes")
    return str(folder)


def weights(module: GeneratorModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.model.generator.state_dict().items()}


@pytest.mark.parametrize("name", ["masked bits", "diffused bits", "sub-tokens"])
def test_training_from_a_cache_of_vectors_is_training_from_the_images(
    name: str, tmp_path: Path
) -> None:
    kind = KINDS[name]
    made = []
    cache = encoded(kind, tmp_path / "cache")
    for data in (ShapesData(**DATA), CachedTokensData(cache, batch_size=6)):
        module = generator_module(kind)
        fit(module, data, tmp_path)
        made.append(weights(module))
    first, second = made
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_channels_are_trained_from_a_cache_of_what_they_quantise(tmp_path: Path) -> None:
    """The posterior is kept, in place of the channels, and drawn anew at each visit."""
    kind = KINDS["channels"]
    module = generator_module(kind)
    before = weights(module)
    trainer = fit(
        module, CachedTokensData(encoded(kind, tmp_path / "cache"), batch_size=6), tmp_path
    )
    assert float(trainer.callback_metrics["val/loss"]) > 0
    after = weights(module)
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())
