from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.cli.convert import main
from tessellar.data import CachedTokensData, ImageFolderData
from tessellar.errors import UserError
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(vocab_size=300, dim=4)
    model = ViTVQ(
        quantizer, 16, patch_size=4, width=16, encoder_depth=1, decoder_depth=1, num_heads=2
    )
    return str(export_tokenizer(model.eval(), tmp_path / "tokenizer"))


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return str(tmp_path / "pictures")


def test_a_folder_is_encoded_and_read_back(
    tokenizer: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "cache")
    options = ["--data.root", pictures, "--data.size", "16", "--data.val_share", "0.25"]
    command = [
        "cache",
        tokenizer,
        "--data",
        "tessellar.data.ImageFolderData",
        *options,
        "--out",
        out,
        "--device",
        "cpu",
    ]
    main(command)
    assert "train: 6 images, views of each: 2" in capsys.readouterr().out
    images = ImageFolderData(pictures, 16, val_share=0.25, batch_size=2)
    data = CachedTokensData(out, batch_size=2)
    assert data.num_classes == 2 and data.name == "pictures"
    model = load_tokenizer(tokenizer)
    for loaders in (
        (data.train_dataloader(), images.train_dataloader()),
        (data.val_dataloader(), images.val_dataloader()),
    ):
        for ours, theirs in zip(*loaders, strict=True):
            assert torch.equal(ours["tokens"], model.encode(theirs["image"]))
    with pytest.raises(UserError, match="train exists"):
        main(command)
    (tmp_path / "cache" / "val" / "header.json").unlink()
    main([*command, "--parts", "train", "--overwrite"])
    assert not (tmp_path / "cache" / "val" / "header.json").exists()


def test_what_is_missing_is_asked_for(tokenizer: str, pictures: str):
    with pytest.raises(UserError, match="--out FOLDER"):
        main(["cache", tokenizer, "--data", "tessellar.data.ShapesData"])
    with pytest.raises(UserError, match="--data tessellar.data.ImageFolderData"):
        main(["cache", tokenizer, "--out", "somewhere"])


def test_images_of_another_size_are_refused(tokenizer: str, tmp_path: Path):
    with pytest.raises(UserError, match="images of 32x32, the tokenizer takes 16x16"):
        main(
            [
                "cache",
                tokenizer,
                "--data",
                "tessellar.data.ShapesData",
                "--out",
                str(tmp_path / "c"),
                "--device",
                "cpu",
            ]
        )
    assert not (tmp_path / "c" / "train").exists()
