"""Training from a cache is training from the images: the same weights, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from tessellar.data import CachedTokensData, ImageDataModule, ImageFolderData
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def make_tokenizer(seed: int = 0) -> ViTVQ:
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(vocab_size=300, dim=4)
    return ViTVQ(
        quantizer,
        image_size=16,
        patch_size=4,
        width=16,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
    ).eval()


def train(
    data: ImageDataModule, tokenizer: ViTVQ, root: Path
) -> tuple[dict[str, torch.Tensor], float]:
    """Weights and validation loss after three epochs."""
    torch.manual_seed(1)
    module = GeneratorModule(
        tokenizer,
        lambda layout: LlamaGen(
            layout, width=16, depth=1, num_heads=2, num_classes=3, ffn_multiple_of=8
        ),
    )
    trainer = Trainer(max_epochs=3, default_root_dir=root, **QUIET)
    trainer.fit(module, data)
    weights = {name: tensor.clone() for name, tensor in module.model.generator.state_dict().items()}
    return weights, float(trainer.callback_metrics["val/loss"])


@pytest.fixture
def images(image_root: Path) -> ImageFolderData:
    return ImageFolderData(
        str(image_root), 16, val_share=0.2, crop="ten", flip=False, batch_size=4, seed=3
    )


@pytest.fixture
def cache(images: ImageFolderData, tmp_path: Path) -> str:
    for part, dataset in (("train", images.train_dataset()), ("val", images.val_dataset())):
        encode_dataset(make_tokenizer(), dataset, tmp_path / "cache" / part, name="pictures")
    return str(tmp_path / "cache")


def test_the_weights_are_the_same_to_the_bit(images: ImageFolderData, cache: str, tmp_path: Path):
    from_images, val_images = train(images, make_tokenizer(), tmp_path)
    from_cache, val_cache = train(
        CachedTokensData(cache, batch_size=4, seed=3), make_tokenizer(), tmp_path
    )
    assert from_images.keys() == from_cache.keys()
    assert all(torch.equal(tensor, from_cache[name]) for name, tensor in from_images.items())
    assert val_images == val_cache
    other, _ = train(CachedTokensData(cache, batch_size=4, seed=4), make_tokenizer(), tmp_path)
    assert not all(torch.equal(tensor, other[name]) for name, tensor in from_images.items())


def test_a_run_with_another_tokenizer_ends_before_its_first_step(cache: str, tmp_path: Path):
    with pytest.raises(UserError, match="encoded by another tokenizer"):
        train(CachedTokensData(cache, batch_size=4), make_tokenizer(seed=1), tmp_path)
