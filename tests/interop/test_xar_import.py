"""xAR's official files through `import_model`: the VAE, then the generator over it; keys there and back; refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.models.xar import XAR
from tessellar.models.xar.official import from_official, to_official
from tessellar.parity.recording import read_recording
from tessellar.pipeline import ImageGenerator
from tessellar.processes.flow import EulerMaruyama
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import to_official as vae_keys
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

GOLDEN = Path(__file__).parents[1] / "golden" / "xar"
LAYOUT = grid_layout(16, 16, Continuous(16))


def official() -> dict[str, Tensor]:
    return dict(read_recording(GOLDEN).weights["model"])


def test_keys_there_and_back() -> None:
    state = official()
    generator = from_official(state, LAYOUT)
    assert generator.num_heads == 4  # from the saved rotation table
    back = to_official(generator)
    buffers = {name for name in state if name == "mask" or ".rope." in name}
    assert back.keys() == state.keys() - buffers
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name


def test_unequal_stacks_and_odd_sizes() -> None:
    made = XAR(LAYOUT, "cell:8", 24, 2, 2, 7, mlp_ratio=3.0, decoder_depth=1).eval()
    again = from_official(to_official(made), LAYOUT, num_heads=2)
    assert (
        len(again.encoder.blocks) == 2 and len(again.decoder.blocks) == 1 and again.num_classes == 7
    )
    x, t = torch.randn(1, 256, 16), torch.rand(1, 4)
    condition = made.make_conditioner().of_labels(torch.tensor([3]))
    assert torch.equal(made.velocity(x, t, condition), again.velocity(x, t, condition))


def test_vae_and_generator_from_their_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = KLVAE(GaussianBottleneck(16), 16, 32, (1,), 1)
    torch.save({"model": vae_keys(vae)}, tmp_path / "kl.pth")
    save_file(official(), tmp_path / "xar.safetensors")
    options = ImportOptions(image_size=16)
    tokenizer = import_model("xar", str(tmp_path / "kl.pth"), options=options)
    assert isinstance(tokenizer, KLVAE) and float(tokenizer.quantizer.scale) == pytest.approx(
        KL16_SCALE
    )
    model = import_model(
        "xar", str(tmp_path / "xar.safetensors"), str(tmp_path / "kl.pth"), options=options
    )
    assert isinstance(model, ImageGenerator) and isinstance(model.generator, XAR)
    images = model.sample(model.class_condition([1]), Sampling(flow=EulerMaruyama(2)), [0])
    assert images.shape == (1, 3, 16, 16) and bool(images.isfinite().all())


def test_what_does_not_fit() -> None:
    state = official()
    with pytest.raises(UserError, match="not the weights of an xAR generator"):
        from_official({"x": torch.zeros(1)}, LAYOUT)
    with pytest.raises(UserError, match="of another shape: encoder.project.weight"):
        from_official(state, grid_layout(16, 16, Continuous(8)))
    del state["pred.bias"]
    with pytest.raises(UserError, match="1 missing: output.bias"):
        from_official(state, LAYOUT)
    with pytest.raises(UserError, match="unknown: surprise"):
        from_official({**official(), "surprise": torch.zeros(1)}, LAYOUT)
