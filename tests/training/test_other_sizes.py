"""From squares to rectangles: positions follow, and a rectangle is trained, sampled and measured."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

import tessellar
from tessellar.checkpoints.card import Record
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.fitting import Sizes, load_fitting, resampled
from tessellar.data.sets.image_folder import ImageFolderData
from tessellar.data.sets.shapes import ShapesData
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import Reconstructions
from tessellar.evaluation.networks.no_network import NoNetwork
from tessellar.evaluation.sources import DatasetImages
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.layout import Categorical, Continuous, grid_layout
from tessellar.tokenizers.llamagen import LlamaGenVQ
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.tokenizer_module import TokenizerModule
from tests.tiny.pairs import GENERATORS


def tokenizer(size: int | tuple[int, int]) -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(VectorQuantizer(16, 4), size, 4, 16, 1, 1, 2)


def test_positions_of_patches_become_those_of_a_rectangle() -> None:
    table = torch.randn(1, 16, 8)
    found = resampled(
        table, torch.Size((1, 24, 8)), Sizes(image_size=(16, 16)), Sizes(image_size=(16, 24))
    )
    maps = rearrange(table, "1 (h w) d -> 1 d h w", h=4)
    expected = F.interpolate(maps, size=(4, 6), mode="bicubic")
    torch.testing.assert_close(found, rearrange(expected, "1 d h w -> 1 (h w) d"))
    # With a class token before them, which is kept.
    with_token = torch.cat([torch.full((1, 1, 8), 7.0), table], 1)
    again = resampled(
        with_token, torch.Size((1, 25, 8)), Sizes(image_size=(16, 16)), Sizes(image_size=(16, 24))
    )
    assert torch.equal(again[:, 1:], found) and torch.equal(again[:, :1], with_token[:, :1])
    # A table that counts something else is none of positions.
    sizes = Sizes(image_size=(16, 16)), Sizes(image_size=(16, 24))
    assert resampled(table, torch.Size((1, 23, 8)), *sizes) is None


@pytest.mark.parametrize(
    "make, kind, has_tables",
    [
        (
            lambda layout: LlamaGen(layout, 16, 1, 2, num_classes=3, ffn_multiple_of=8),
            Categorical(16),
            False,
        ),
        (GENERATORS["MAR"], Continuous(4), True),
    ],
    ids=["rotary", "absolute"],
)
def test_generators_of_another_shape_take_all_but_positions(make, kind, has_tables: bool) -> None:
    there = make(grid_layout(4, 4, kind))
    here = make(grid_layout(4, 6, kind))
    fitted = load_fitting(
        here, there.state_dict(), "it", theirs=Sizes(there.layout), ours=Sizes(here.layout)
    )
    own = here.state_dict()
    moved = {name.split(" ")[0] for name in fitted.resampled}
    for name, tensor in there.state_dict().items():
        assert name in moved or torch.equal(own[name], tensor), name
    assert bool(moved) == has_tables


def test_a_rectangle_from_a_square_export_to_its_numbers(fit, tmp_path: Path, caplog) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shape = (20 + number, 40 - number, 3)
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    data = ImageFolderData(
        str(tmp_path / "images"), (16, 24), val_share=0.34, batch_size=4, num_workers=0
    )
    assert data.image_size == (16, 24)
    square = str(export_tokenizer(tokenizer(16), tmp_path / "square"))
    with caplog.at_level("INFO", "tessellar"):
        module = TokenizerModule(tokenizer((16, 24)), TokenizerLoss(), init_from=square)
    assert "1 x 16 x 16 to 1 x 24 x 16" in caplog.text
    module.check_data(data)
    fit(module, 1, data=data)
    module.export(tmp_path / "tokenizer", Record(title="rectangle"))
    make = partial(LlamaGen, width=16, depth=1, num_heads=2, num_classes=2, ffn_multiple_of=8)
    trained = GeneratorModule(str(tmp_path / "tokenizer"), make)
    assert str(trained.tokenizer.layout.grid) == "(4, 6)"
    fit(trained, 1, data=data, limit_val_batches=1, val_check_interval=1)
    trained.export(tmp_path / "generator", Record(title="rectangle"))
    model = tessellar.load(tmp_path / "generator")
    assert model.sample([0, 1], output="uint8").shape == (2, 3, 16, 24)
    originals = DatasetImages(data.val_dataset(), "rectangles", "val", None)
    record = evaluate_samples(
        Reconstructions(model.tokenizer, originals), NoNetwork(), None, metrics=["paired"]
    )
    assert record["metrics"]["PSNR"] > 5


def test_from_256_pixels_to_384(fit, tmp_path: Path, caplog) -> None:
    """Exports at the field's sizes, tiny in width: what is made for 256 pixels goes on at 384, from
    tokens of 16 x 16 to 24 x 24, and says what was resized.
    """

    def vit(size: int) -> ViTVQ:
        torch.manual_seed(0)
        return ViTVQ(VectorQuantizer(16, 4), size, 16, 16, 1, 1, 2)

    def convolutional(size: int) -> LlamaGenVQ:
        torch.manual_seed(0)
        return LlamaGenVQ(VectorQuantizer(16, 4), size, channels=32, num_res_blocks=1, z_channels=4)

    make = partial(LlamaGen, width=16, depth=1, num_heads=2, num_classes=10, ffn_multiple_of=8)
    small = ShapesData(size=256, length=8, val_length=4, batch_size=2)
    large = ShapesData(size=384, length=8, val_length=4, batch_size=2)
    for name, kind in (("vit", vit), ("convolutional", convolutional)):
        module = TokenizerModule(kind(256), TokenizerLoss())
        fit(module, 1, data=small)
        module.export(tmp_path / f"{name}256", Record(title=name, data="shapes"))
    generators = GeneratorModule(str(tmp_path / "vit256"), make)
    fit(generators, 1, data=small)
    generators.export(tmp_path / "llamagen256", Record(title="llamagen", data="shapes"))

    with caplog.at_level("INFO", "tessellar"):
        made = TokenizerModule(vit(384), TokenizerLoss(), init_from=str(tmp_path / "vit256"))
    assert "2 resampled to another size: decoder.positions (1 x 256 x 16 to 1 x 576 x 16)" in (
        caplog.text
    )
    before = tessellar.load(tmp_path / "vit256")
    expected = rearrange(before.encoder.positions, "1 (h w) d -> 1 d h w", h=16)
    expected = F.interpolate(expected, size=(24, 24), mode="bicubic")
    positions = made.tokenizer.encoder.positions
    torch.testing.assert_close(positions, rearrange(expected, "1 d h w -> 1 (h w) d"))
    fit(made, 1, data=large)
    made.export(tmp_path / "vit384", Record(title="vit", data="shapes"))

    caplog.clear()
    with caplog.at_level("INFO", "tessellar"):
        source = str(tmp_path / "convolutional256")
        TokenizerModule(convolutional(384), TokenizerLoss(), init_from=source)
        assert "resampled" not in caplog.text
        source = str(tmp_path / "llamagen256")
        larger = GeneratorModule(str(tmp_path / "vit384"), make, init_from=source)
    assert "tokens 16 x 16 to 24 x 24; no weight depends on it" in caplog.text
    ours = larger.model.generator.state_dict()
    theirs = tessellar.load(tmp_path / "llamagen256").generator.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fit(larger, 1, data=large, limit_val_batches=1, val_check_interval=1)
    larger.export(tmp_path / "llamagen384", Record(title="llamagen", data="shapes"))
    model = tessellar.load(tmp_path / "llamagen384")
    assert model.tokenizer.layout.grid == (24, 24)
    assert model.decode(torch.zeros(1, 576, dtype=torch.int64)).shape == (1, 3, 384, 384)
