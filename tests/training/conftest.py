"""Tiny runs: a data module of shapes, a tokenizer and a generator of a few thousand parameters."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from tessellar.data.sets.shapes import ShapesData
from tessellar.models.llamagen import LlamaGen
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.tokenizer_module import TokenizerModule


def make_tokenizer() -> ViTVQ:
    return ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)


def make_data(batch_size: int = 8) -> ShapesData:
    return ShapesData(size=16, length=64, val_length=16, batch_size=batch_size)


def make_tokenizer_module(
    discriminator: torch.nn.Module | None = None, **options: Any
) -> TokenizerModule:
    torch.manual_seed(0)
    loss = TokenizerLoss(Reconstruction(l1=1.0), discriminator=discriminator, adversarial_start=1)
    settings = {"optimizer": OptimizerSettings("muon", lr=1e-3), **options}
    return TokenizerModule(make_tokenizer(), loss, **settings)


def make_generator_module(**options: Any) -> GeneratorModule:
    torch.manual_seed(0)
    generator = partial(LlamaGen, width=16, depth=1, num_heads=2, num_classes=10, ffn_multiple_of=8)
    settings = {"optimizer": OptimizerSettings(lr=1e-3), **options}
    return GeneratorModule(make_tokenizer(), generator, **settings)


class Losses(L.Callback):
    """The training loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.values.append(float(outputs["loss"]))


@pytest.fixture
def make() -> SimpleNamespace:
    """Factories of modules and data."""
    return SimpleNamespace(
        tokenizer_module=make_tokenizer_module,
        generator_module=make_generator_module,
        data=make_data,
    )


@pytest.fixture
def fit(tmp_path) -> Callable[..., tuple[L.Trainer, list[float]]]:
    def run(
        module, steps: int, callbacks: list[L.Callback] | None = None, data=None, **options: Any
    ):
        losses = Losses()
        settings = {"limit_val_batches": 0, "enable_checkpointing": False, **options}
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[losses, *(callbacks or [])],
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{k: v for k, v in settings.items() if k != "ckpt_path"},
        )
        L.seed_everything(0)
        trainer.fit(module, data or make_data(), ckpt_path=options.get("ckpt_path"))
        return trainer, losses.values

    return run
