"""BAR's generator and tokenizer lie in two files, each the weights alone, under the names of what wrapped them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.models.bar import BAR
from tessellar.models.bar import official as generators
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.bar_fsq import BARFSQ
from tessellar.tokenizers.bar_fsq import official as tokenizers
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ

OPTIONS = ImportOptions(num_heads=3, decoder_heads=2)


def saved(state: dict[str, Tensor], file: Path) -> str:
    torch.save({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, file)
    return str(file)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    quantizer = BinaryFSQ(5, centred=False)
    tokenizer = BARFSQ(quantizer, 16, 4, 24, 1, 3, 2.0, 32, 1, 2, norm_in=True, decoder_eps=1e-5)
    generator = BAR(tokenizer.layout, 32, 1, 4, 2, head_width=24, head_depth=1, num_classes=4)
    return (
        saved(generators.to_official(generator), tmp_path / "bar_b_patch2.bin"),
        saved(tokenizers.to_official(tokenizer), tmp_path / "bar_fsq_16bits.bin"),
    )


def test_both_files_make_a_generator_of_images(files: tuple[str, str]) -> None:
    model = import_model("bar", *files, options=OPTIONS)
    assert isinstance(model, ImageGenerator)
    assert isinstance(model.tokenizer, BARFSQ) and isinstance(model.generator, BAR)
    assert model.generator.tokens_each == 4 and model.generator.bits == 20
    images = model.sample(model.class_condition([1]), Sampling(2.0), [0])
    assert images.shape == (1, 3, 16, 16) and bool(images.isfinite().all())


def test_the_tokenizer_alone(files: tuple[str, str]) -> None:
    assert isinstance(import_model("bar_fsq", files[1], options=OPTIONS), BARFSQ)
    with pytest.raises(UserError, match="holds nothing of bar_fsq"):
        import_model("bar_fsq", files[0], options=OPTIONS)
