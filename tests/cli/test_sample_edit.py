"""`sample.py` with a picture: six edits, what the record says of their law, and mistakes in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli.sample import main
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

SIDE = 16
NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), SIDE, 4, 16, 1, 1, 2)
    paths = {}
    for name, generator in (
        ("raster", LlamaGen(tokenizer.layout, 16, 2, 2, num_classes=3, ffn_multiple_of=8)),
        ("any", RAR(tokenizer.layout, 16, 2, 2, num_classes=3)),
    ):
        for parameter in generator.parameters():
            nn.init.normal_(parameter, std=0.3)
        whole = ImageGenerator(tokenizer, generator, ClassConditioner(3), NAMES)
        paths[name] = str(export_generator(whole, folder / name))
    return paths


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in ("x", "y"):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:8, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros_like(mask)).save(folder / "dark.png")
    Image.fromarray(mask[:, :8]).save(folder / "narrow.png")
    (folder / "text.png").write_text("no picture")
    return folder


EDITS = {
    "in-painting": "--image x.png --mask mask.png --edit Inpaint --edit.paste true",
    "out-painting": "--image x.png --edit Outpaint --edit.left 0.5 --edit.top 0.5",
    "continuation": "--image x.png --edit Continue --edit.keep 8",
    "class edit": "--image x.png --edit ClassEdit --edit.share 0.25",
    "interpolation": "--edit Interpolate --edit.other owl --edit.share 0.4 --guidance.scale 2",
    "swap": "--image x.png --other y.png --edit Swap --mask mask.png",
}


def words_of(text: str, pictures: Path) -> list[str]:
    return [str(pictures / word) if word.endswith(".png") else word for word in text.split()]


@pytest.mark.parametrize("name", EDITS)
def test_six_edits(name: str, models: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    words = words_of(EDITS[name], pictures)
    edits = {}
    for kind, model in models.items():
        out = tmp_path / kind
        main([model, "--out", str(out), "--classes", "cat,dog", *words])
        record = json.loads((out / "samples.json").read_text())
        assert record["count"] == 2
        edits[kind] = record["edit"]
    always = {"continuation": "exact", "interpolation": "exact", "swap": "nothing is drawn"}
    if name == "out-painting":  # a half and a quarter of each side are margins
        assert edits["raster"]["kept_tokens"] == 1
    assert edits["raster"]["law"] == always.get(name, "approximate")
    assert edits["any"]["law"] == always.get(name, "exact") or name == "continuation"


def test_pasted_pixels_are_those_of_the_picture(
    models: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    words = words_of(EDITS["in-painting"], pictures)
    main([models["any"], "--out", str(tmp_path / "out"), "--classes", "cat", *words])
    made = np.array(Image.open(tmp_path / "out" / "000000_0000_cat.png"))
    given = np.array(Image.open(pictures / "x.png"))
    outside = np.array(Image.open(pictures / "mask.png")) == 0
    assert (made[outside] == given[outside]).all() and (made != given).any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--image x.png", "--mask"),
        ("--mask mask.png", "needs a picture"),
        ("--image x.png --mask narrow.png", "16 x 16"),
        ("--image x.png --mask dark.png", "nothing to draw anew"),
        ("--image x.png --mask text.png", "cannot read"),
        ("--image text.png --mask mask.png", "cannot read"),
        ("--image none.png --mask mask.png", "cannot read"),
        ("--image x.png --edit Inpaint", "needs a mask"),
        ("--image x.png --edit Continue --edit.keep 16", "16 entities"),
        ("--edit Continue", "needs a picture"),
        ("--image x.png --mask mask.png --edit Swap", "--other"),
        ("--image x.png --other y.png --edit Swap", "give one of the two"),
        ("--edit Interpolate", "second class"),
        ("--edit Interpolate --edit.other cow", "cow"),
        ("--image x.png --mask mask.png --search Beam", "not both"),
        ("--image x.png --mask mask.png --algorithm SpeculativeJacobi", "drawn by Ancestral"),
        ("--image x.png --edit Inpant", "Inpaint"),
    ],
)
def test_mistakes_take_one_line(
    models: dict[str, str], pictures: Path, tmp_path: Path, words: str, line: str
) -> None:
    with pytest.raises(UserError) as caught:
        main([models["raster"], "--out", str(tmp_path / "out"), *words_of(words, pictures)])
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
