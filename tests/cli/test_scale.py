"""`convert.py scale`: an export whose latents have unit variance on a data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer, read_source
from tessellar.cli.convert import main
from tessellar.data import ImageFolderData
from tessellar.errors import UserError
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.vit_vq import ViTVQ


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    torch.manual_seed(0)
    made = ViTVQ(GaussianBottleneck(3, scale=0.2), 16, 4, 16, 1, 1, 2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return str(export_tokenizer(made.eval(), tmp_path / "tokenizer"))


def pictures(folder: Path) -> str:
    generator = np.random.default_rng(0)
    for i in range(12):
        path = folder / "pictures" / "things" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return str(folder / "pictures")


def test_latents_of_the_data_get_unit_variance(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = pictures(tmp_path), str(tmp_path / "scaled")
    data = ["--data", "tessellar.data.ImageFolderData", "--data.root", root, "--data.size", "16"]
    main(["scale", tokenizer, *data, "--out", out, "--batch_size", "5", "--device", "cpu"])
    assert "scale 0.2000 -> " in capsys.readouterr().out
    before, after = load_tokenizer(tokenizer), load_tokenizer(out)
    assert read_source(out).record.data == ImageFolderData(root, size=16).name
    dataset = ImageFolderData(root, size=16).train_dataset()
    images = dataset.batch(range(len(dataset)))["image"]
    mean, std = after.posterior(images)  # type: ignore[attr-defined]
    spread = (mean.var(correction=0) + std.square().mean()).sqrt()
    assert float(spread.detach()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(
        after.decode(after.encode(images)), before.decode(before.encode(images))
    )


def test_what_is_missing_is_asked_for(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises((UserError, SystemExit)):
        main(["scale", tokenizer, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
