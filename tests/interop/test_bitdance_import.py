"""BitDance's files hold the frozen tokenizer beside the generator: `convert.py import` takes both, each by its keys."""

from pathlib import Path

import pytest
import torch

from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.pipeline import ImageGenerator
from tessellar.processes.flow import EulerMaruyamaToData
from tessellar.protocol.layout import Bits
from tessellar.sampling.settings import Sampling
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.bitdance import BinaryAutoencoder

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = ImportOptions(image_size=8, num_heads=2)


@pytest.mark.parametrize("entry", ["ema", "model"])
def test_a_generator_and_the_tokenizer_in_its_file(entry: str, tmp_path: Path) -> None:
    state, _ = read_safetensors(GOLDEN / "bitdance" / "weights.safetensors")
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    contents = {"ema": {"ema": state, "model": other}, "model": {"model": state}}
    file = str(tmp_path / "BitDance.pt")
    torch.save(contents[entry], file)
    model = import_model("bitdance", file, file, options=OPTIONS)
    assert isinstance(model, ImageGenerator) and isinstance(model.tokenizer, BinaryAutoencoder)
    assert model.tokenizer.layout.segments[0].kind == Bits(8)
    conv = model.tokenizer.encoder.conv_in.weight
    assert torch.equal(conv, state["vae.encoder.conv_in.weight"])
    images = model.sample(model.class_condition([1]), Sampling(flow=EulerMaruyamaToData(2)), [0])
    assert images.shape == (1, 3, 8, 8) and bool(images.isfinite().all())


def test_the_head_of_the_text_to_image_model_alone_is_no_generator() -> None:
    file = str(GOLDEN / "bitdance_t2i_head" / "weights.safetensors")
    with pytest.raises(UserError, match="holds nothing of bitdance"):
        import_model("bitdance", file, options=OPTIONS)
