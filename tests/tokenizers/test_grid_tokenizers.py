"""ViT-VQ and LlamaGen's VQGAN: both sides agree, parameter counts of the published variants, sizes that do not fit."""

import pytest
import torch

from tessellar.protocol.configured import build
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.llamagen import LlamaGenVQ, vq_8, vq_16
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ


def make(name: str) -> Tokenizer:
    torch.manual_seed(0)
    if name == "vit":
        tokenizer: Tokenizer = ViTVQ(VectorQuantizer(32, 4), 16, 4, 16, 1, 1, 2)
        for parameter in tokenizer.parameters():  # residual outputs start at zero
            torch.nn.init.normal_(parameter, std=0.2)
        return tokenizer
    return LlamaGenVQ(VectorQuantizer(32, 4), 16, 32, (1, 2, 1), 1, 16)


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_forward_is_decode_of_encode(name: str) -> None:
    tokenizer, images = make(name).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.encode(images)
    output = tokenizer(images)
    assert tokenizer.layout == grid_layout(4, 4, Categorical(32)) and tokens.shape == (2, 16)
    tokenizer.layout.check(tokens)
    assert torch.equal(tokens, output.tokens)
    torch.testing.assert_close(tokenizer.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_gradients_reach_every_parameter(name: str) -> None:
    tokenizer = make(name)
    output = tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    without = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    # a key's bias shifts all scores of a query alike: its gradient is zero up to rounding
    assert not [n for n in without if not n.endswith("k.bias")]
    assert any(tokenizer.last_layer is p for p in tokenizer.parameters())


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_config_rebuilds_an_equal_tokenizer(name: str) -> None:
    tokenizer = make(name).eval()
    again = build(tokenizer.config).eval()
    again.load_state_dict(tokenizer.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_gelu_is_exact_where_it_is_asked_for() -> None:
    approximate = make("vit").eval()
    exact = ViTVQ(VectorQuantizer(32, 4), 16, 4, 16, 1, 1, 2, gelu="none").eval()
    exact.load_state_dict(approximate.state_dict())
    assert isinstance(approximate, ViTVQ)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    difference = (exact.latents(images) - approximate.latents(images)).abs().max()
    assert 0 < difference < 0.02  # both approximate one function
    assert build(exact.config).config == exact.config


def test_tokens_are_in_raster_order() -> None:
    tokenizer, images = make("cnn").eval(), torch.rand(1, 3, 16, 16)
    assert isinstance(tokenizer, LlamaGenVQ)
    maps = tokenizer.maps(images)
    assert torch.equal(
        tokenizer.encode(images)[0, 4 * 1 + 2], tokenizer.quantizer.encode(maps[:, :, 1, 2])[0]
    )


def test_the_cnn_takes_oblong_images_and_others_than_it_was_built_for() -> None:
    square = make("cnn").eval()
    assert isinstance(square, LlamaGenVQ)
    wide = LlamaGenVQ(VectorQuantizer(32, 4), (16, 24), 32, (1, 2, 1), 1, 16).eval()
    wide.load_state_dict(square.state_dict())
    assert wide.layout.grid == (4, 6) and build(wide.config).image_size == (16, 24)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    output, maps = wide(images), square.maps(images)
    assert output.tokens.shape == (2, 24) and output.reconstruction.shape == images.shape
    tokens = square.quantizer.encode(maps.permute(0, 2, 3, 1))
    assert torch.equal(tokens.flatten(1), output.tokens)
    codes = square.quantizer.decode(output.tokens.view(2, 4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(square.paint(codes), wide.decode(output.tokens))


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_weights_in_half_precision(name: str) -> None:
    tokenizer = make(name).eval()
    tokenizer.bfloat16()
    images = (torch.rand(1, 3, 16, 16) * 2 - 1).bfloat16()
    assert (
        tokenizer(images).reconstruction.dtype
        == tokenizer.decode(tokenizer.encode(images)).dtype
        == torch.float32
    )


def test_dropout_is_everywhere_in_the_cnn_or_nowhere() -> None:
    made = LlamaGenVQ(VectorQuantizer(8, 4), 16, 32, (1, 2), 1, 16, dropout=0.25)
    assert {m.p for m in made.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_parameter_counts_of_the_published_variants() -> None:
    with torch.device("meta"):
        models = {"vq_16": vq_16(), "vq_8": vq_8(), "patchgan": PatchGAN()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == {"vq_16": 71_883_403, "vq_8": 70_109_835, "patchgan": 2_765_633}
    assert models["vq_16"].layout.grid == (16, 16) and models["vq_8"].layout.grid == (32, 32)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        ViTVQ(VectorQuantizer(8, 4), image_size=30, patch_size=4)
    with pytest.raises(ValueError, match="does not divide"):
        LlamaGenVQ(VectorQuantizer(8, 4), image_size=100)
    with pytest.raises(ValueError, match="does not divide"):
        LlamaGenVQ(VectorQuantizer(8, 4), image_size=(96, 100))


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_inputs_that_do_not_fit(name: str) -> None:
    tokenizer = make(name)
    for method in (tokenizer.encode, tokenizer.forward):
        with pytest.raises(ValueError, match=r"shape \(1, 3, 16, 20\).*needs"):
            method(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"shape \(1, 15\).*4x4"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode(torch.full((1, 16), 32))
