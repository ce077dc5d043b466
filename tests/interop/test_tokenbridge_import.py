"""TokenBridge's two files through the command: kl16.ckpt and the generator's, which become one export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tessellar
from tessellar.cli.convert import main
from tessellar.errors import UserError
from tessellar.models.tokenbridge import KL16_ORDER, TokenBridge
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import to_official
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.tokenbridge import PostQuantized

WEIGHTS = Path(__file__).parents[1] / "golden" / "tokenbridge" / "weights.safetensors"


def words(folder: Path, *more: str) -> list[str]:
    """The command, with an average in the generator's file that has no buffers, as published."""
    torch.manual_seed(0)
    vae = KLVAE(GaussianBottleneck(16, scale=1.0), 64, 32, (1, 1, 1, 1, 1), 1)
    torch.save({"model": to_official(vae)}, folder / "kl16.ckpt")
    raw = load_file(WEIGHTS)
    buffers = ("channel_mask", "boundaries", "reconstruction_values")
    average = {name: t + 0.5 for name, t in raw.items() if name not in buffers}
    torch.save({"model": raw, "model_ema": average, "epoch": 1}, folder / "last.pth")
    files = [str(folder / "last.pth"), "--tokenizer", str(folder / "kl16.ckpt")]
    out = ["--out", str(folder / "export")]
    return ["import", "tokenbridge", *files, "--image-size", "64", "--num-heads", "4", *out, *more]


def test_the_published_files_become_an_export_that_samples(tmp_path: Path) -> None:
    main(words(tmp_path, "--variant", "16"))
    model = tessellar.load(tmp_path / "export")
    assert isinstance(model, ImageGenerator) and isinstance(model.tokenizer, PostQuantized)
    generator = model.generator
    assert isinstance(generator, TokenBridge) and generator.channels.order == KL16_ORDER
    assert generator.head.first_input == "official" and model.tokenizer.grid.levels == 16
    expected = load_file(WEIGHTS)["channel_embed"] + 0.5
    assert torch.equal(generator.head.position, expected)
    sampling = Sampling(algorithm=Ancestral(steps=2))
    assert model.sample(model.class_condition([3]), sampling, [0]).shape == (1, 3, 64, 64)


def test_another_number_of_levels_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts 16 levels of a channel, but the tokenizer gives"):
        main(words(tmp_path))
    with pytest.raises(UserError, match="of TokenBridge it is a number of levels, such as 64"):
        main(words(tmp_path, "--variant", "4bits"))
