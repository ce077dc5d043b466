"""tessellar as a library: what a model takes and gives from Python, and what it answers to mistakes."""

import logging
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tessellar
from tessellar import images as pictures
from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.errors import UserError
from tessellar.images import from_uint8, to_uint8
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.class_names import class_ids
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import Constant, Cosine
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.tiny.pairs import TOKENIZERS

NAMES = ("t-shirt", "ankle boot", "bag")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 2, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    whole = ImageGenerator(tokenizer, generator, ClassConditioner(3), class_names=NAMES)
    return export_generator(whole, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def generator(folder: Path) -> ImageGenerator:
    return tessellar.load_generator(folder)


def test_samples_by_name_and_id_are_pictures(generator: ImageGenerator) -> None:
    images = generator.sample(classes=["bag", 0], guidance=1.5, seed=3)
    assert [type(image) for image in images] == [Image.Image] * 2 and images[0].size == (8, 8)
    tensors = generator.sample(
        classes=[2, 0], sampling=Sampling(guidance=1.5), seeds=[3, 4], output="tensor"
    )
    assert tensors.dtype == torch.float32 and tensors.shape == (2, 3, 8, 8)
    again = generator.sample(classes="bag,0", guidance=1.5, seed=3, output="uint8", batch_size=1)
    assert (again.int() - to_uint8(tensors).int()).abs().max() <= 1
    assert np.array_equal(np.asarray(images[0]), to_uint8(tensors)[0].permute(1, 2, 0).numpy())


def test_the_shortest_calls_work(generator: ImageGenerator) -> None:
    assert len(generator.sample()) == 3  # one of each class
    assert len(generator.sample([0, 1])) == 2 and len(generator.sample("bag", count=4)) == 4
    condition = generator.class_condition([0, 1])
    tensors = generator.sample(condition)
    assert isinstance(tensors, torch.Tensor) and len(tensors) == 2
    assert torch.equal(tensors, generator.sample(condition, Sampling(), [0, 1]))


def test_a_number_is_a_constant_guidance(generator: ImageGenerator) -> None:
    assert Sampling(guidance=1.5) == Sampling(guidance=Constant(1.5)) and Sampling(
        guidance=2
    ).guidance == Constant(2.0)
    assert Sampling(guidance=1.5).describe()["guidance"]["init_args"] == {"scale": 1.5}
    plain = generator.sample("bag", output="tensor")
    assert not torch.equal(plain, generator.sample("bag", guidance=4, output="tensor"))
    assert torch.equal(
        generator.sample("bag", guidance=Cosine(4.0), output="tensor"),
        generator.sample("bag", Sampling(guidance=Cosine(4.0)), output="tensor"),
    )
    with pytest.raises(UserError, match="guidance is 'strong'; it must be a GuidanceSchedule"):
        Sampling(guidance="strong")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_precision(folder: Path, dtype: torch.dtype) -> None:
    model = tessellar.load_generator(folder, device="cpu", dtype=dtype)
    assert model.device.type == "cpu" and next(model.parameters()).dtype == dtype
    images = model.sample("bag", guidance=1.5)
    assert model.encode(images).shape == (1, 4) and model.image_size == (8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(classes=["shoe"]), "there is no class 'shoe'; there are"),
        (dict(classes=["bagg"]), "there is no class 'bagg'; did you mean 'bag'"),
        (dict(classes=[3]), "class id 3 does not exist; classes are 0 to 2"),
        (dict(classes=[]), "no class is named"),
        (dict(classes=[0], seeds=0), "1 images need as many seeds, not 0"),
        (dict(classes=[0], seeds=[1, 2]), "1 images need as many seeds"),
        (dict(classes=[0], output="jpeg"), "output is 'jpeg'; there are pil, tensor and uint8"),
        (dict(classes=[0], count=0), "count is 0"),
        (dict(classes=[0], batch_size=0), "batch_size is 0"),
        (dict(prompts="a bag"), "reads class ids, not text: give classes"),
    ],
)
def test_mistakes_are_value_errors_of_one_line(
    generator: ImageGenerator, call: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        generator.sample(**call)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_each_kind_of_model_has_its_loader(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a generator; a tokenizer is needed"):
        tessellar.load_tokenizer(folder)
    with pytest.raises(ValueError, match="device 'abacus' is not available"):
        tessellar.load_generator(folder, device="abacus")


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "Hita"])
@torch.no_grad()
def test_every_tokenizer_takes_what_users_have(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]().eval()
    height, width = tokenizer.image_size
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    tokens = tokenizer.encode(from_uint8(pixels))
    given = [
        pixels,
        from_uint8(pixels).double(),
        [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels],
        pixels.permute(0, 2, 3, 1).numpy(),
    ]
    for form in given:
        torch.testing.assert_close(tokenizer.encode(form), tokens)
        torch.testing.assert_close(
            tokenizer.draw(form, torch.Generator().manual_seed(1)).shape, tokens.shape
        )
    narrow = tokens.double() if tokens.is_floating_point() else tokens.to(torch.int32)
    images = tokenizer.decode(tokens)
    if name != "FlexTok":  # whose decoder draws noise
        torch.testing.assert_close(tokenizer.decode(narrow), images)
        torch.testing.assert_close(tokenizer.decode(narrow.numpy()), images)
    for wrong in (
        pixels.long(),
        from_uint8(pixels) * 127,
        [pixels],
        np.zeros((2, 8, 8)),
        torch.zeros(1, 3, 5, 7),
    ):
        with pytest.raises(ValueError):
            tokenizer.encode(wrong)
    with pytest.raises(ValueError):
        tokenizer.decode(tokens.bool())


def test_ranges_that_look_like_another_one_are_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2).eval()
    pictures._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "tessellar"):
        tokenizer.encode(torch.rand(1, 3, 8, 8))
        tokenizer.encode(torch.rand(1, 3, 8, 8))
        tokenizer.encode(torch.rand(1, 3, 8, 8) * 4 - 2)
    assert [re.sub(r"[;,:].*", "", line) for line in caplog.messages] == [
        "images lie in [0",
        "images reach beyond [-1",
    ]
    with pytest.raises(ValueError, match=r"images lie in \[0, 255\]; floats must be in \[-1, 1\]"):
        tokenizer.encode(torch.tensor([0.0, 255.0]).repeat(96).view(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"needs \[B, 3, 8, 8\]"):
        tokenizer.encode(Image.new("RGB", (9, 8)))
    with pytest.raises(ValueError, match=r"needs \[B, 4\]"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="has mode F: convert it"):
        tokenizer.encode(Image.new("F", (8, 8)))


def test_transparent_pictures_lie_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(pictures.from_pictures(clear), torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("all", [0, 1, 2]),
        ("bag", [2]),
        ("t-shirt,2", [0, 2]),
        ("0-1", [0, 1]),
        (" Bag , ankle_boot", [2, 1]),
        (["bag", 0, "1"], [2, 0, 1]),
        (1, [1]),
    ],
)
def test_classes_are_named_in_any_form(text: object, ids: list[int]) -> None:
    assert class_ids(text, 3, NAMES) == ids  # type: ignore[arg-type]


def test_folders_that_are_numbers_are_named_by_their_numbers() -> None:
    names = ("2", "10", "30")
    assert class_ids("10", 3, names) == [1] and class_ids("2-10", 3, names) == [0, 1]
    assert class_ids(["10", 1], 3, names) == [1, 1]
    with pytest.raises(UserError, match="there is no class '7'; there are"):
        class_ids("7", 3, names)
    assert class_ids("a,b", 2, ("a,b", "a")) == [0] and class_ids("a,a,b", 2, ("a,b", "a")) == [
        1,
        0,
    ]
    with pytest.raises(UserError, match="classes 0 and 1 are all named 'x': give the id"):
        class_ids("x", 2, ("x", "x"))
    with pytest.raises(UserError, match="does not know the names"):
        class_ids("cat", 2)


def test_help_begins_with_use() -> None:
    text = pydoc.plain(pydoc.render_doc(tessellar))
    assert text.index("load_generator") < text.index("symbolic links")
    assert "sample(classes=" in text.split("\n\n")[2] + text.split("\n\n")[3]


@pytest.mark.parametrize("name", ["LlamaGen VQ", "KL VAE", "MaskGIT-VQGAN"])
@torch.no_grad()
def test_convolutional_tokenizers_take_rectangles(name: str, tmp_path: Path) -> None:
    square = TOKENIZERS[name]().eval()
    folder = export_tokenizer(square, tmp_path / "square")
    stride = 16 // square.layout.segments[0].shape[0]
    wide = tessellar.load_tokenizer(folder, image_size=(2 * stride, 5 * stride))
    picture = Image.new("RGB", (5 * stride, 2 * stride), (200, 30, 30))
    tokens = wide.encode(picture)
    assert tokens.shape[1] == 10 and wide.decode(tokens).shape == (1, 3, 2 * stride, 5 * stride)
    assert wide.state_dict().keys() == square.state_dict().keys()
    with pytest.raises(ValueError, match="cannot take images of 9 x 16: .*stride"):
        tessellar.load_tokenizer(folder, image_size=(9, 16))


def test_a_tokenizer_of_one_size_says_so(tmp_path: Path) -> None:
    vit = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    with pytest.raises(ValueError, match="cannot take images of 8 x 16: .*init_from"):
        tessellar.load_tokenizer(export_tokenizer(vit, tmp_path / "vit"), image_size=(8, 16))
