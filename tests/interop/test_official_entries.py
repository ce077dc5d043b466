"""Of a published file with several sets of weights the one is imported that the system's paper evaluates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.convert import main
from tessellar.cli.importing import papers
from tessellar.errors import UserError
from tessellar.models.xar import official as xar
from tessellar.networks.vision import VisionModel
from tessellar.parity.recording import read_recording
from tessellar.pipeline import ImageGenerator
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.vit_vq import ViTVQ

GOLDEN = Path(__file__).parents[1] / "golden"


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }


@pytest.fixture
def vae(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return str(
        export_tokenizer(
            KLVAE(GaussianBottleneck(16), 256, 32, (1, 1, 1, 1, 1), 1), tmp_path / "vae"
        )
    )


def test_xar_takes_the_average(vae: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tessellar")
    state = dict(read_recording(GOLDEN / "xar").weights["model"])
    content = {"model": state, "model_ema": averaged(state), "epoch": 799}
    torch.save(content, tmp_path / "official.pth")
    words = ["import", "xar", str(tmp_path / "official.pth"), "--tokenizer", vae, "--out"]
    main([*words, str(tmp_path / "ours")])
    assert any(
        "'model_ema' is taken, not model (--key takes another)" in line for line in caplog.messages
    )
    main([*words, str(tmp_path / "raw"), "--key", "model"])
    name = "class_emb.weight"
    for folder, expected in (("ours", state[name] + 1), ("raw", state[name])):
        model = tessellar.load(tmp_path / folder)
        assert isinstance(model, ImageGenerator)
        assert torch.equal(xar.to_official(model.generator)[name], expected)  # type: ignore[arg-type]
    caplog.clear()
    torch.save({"model": state}, tmp_path / "official.pth")
    main([*words, str(tmp_path / "only")])
    assert any(
        "has no 'model_ema', which the paper evaluates; 'model' is taken" in line
        for line in caplog.messages
    )


def evaluated(kind: str) -> dict[str, str]:
    """By paper, the entry that it evaluates, of what is not published flat."""
    found = {}
    for name, paper in papers().items():
        for importer in getattr(paper, kind):
            if importer.entries:
                found[name] = importer.entries[0]
    return found


def test_every_importer_states_the_entry_that_its_paper_evaluates() -> None:
    tokenizers = {
        "llamagen": "ema",
        "hita": "ema",
        "retok": "ema",
        "kl_vae": "model",
        "mar": "model",
        "tokenbridge": "model",
        "xar": "model",
        "alitok": "model_state",
        "lpd": "ema",
        "ibq": "state_dict",
        "open_magvit2": "state_dict",
        "tokenflow": "ema",
        "rectok": "model_ema",
        "bitdance": "ema",
        "uniwetok": "state_dict",
    }
    generators = {
        "llamagen": "model",
        "hita": "ema",
        "retok": "model",
        "mar": "model_ema",
        "tokenbridge": "model_ema",
        "xar": "model_ema",
        "lpd": "model",
        "ibq": "state_dict",
        "open_magvit2": "state_dict",
        "bitdance": "ema",
        "tokenflow": "model",
    }
    assert evaluated("tokenizers") == {**tokenizers, "var": "trainer.vae_local"}
    assert evaluated("generators") == {
        **generators,
        "var": "trainer.var_wo_ddp",
        "token_shuffle": "model",
    }


def test_llamagen_reads_its_tokenizer_and_its_generator_from_files_with_averages(
    tmp_path: Path, tokenizer: Callable[..., ViTVQ]
) -> None:
    state, _ = read_safetensors(GOLDEN / "llamagen" / "weights_vq.safetensors")
    torch.save(
        {"model": state, "ema": averaged(state), "discriminator": {"w": torch.zeros(1)}},
        tmp_path / "vq.pt",
    )
    main(
        [
            "import",
            "llamagen",
            str(tmp_path / "vq.pt"),
            "--image-size",
            "8",
            "--out",
            str(tmp_path / "vq"),
        ]
    )
    found = tessellar.load(tmp_path / "vq").state_dict()["quantizer.codebook.weight"]
    assert torch.equal(found, state["quantize.embedding.weight"] + 1)


def test_a_file_that_nothing_decides_is_refused(tmp_path: Path) -> None:
    """TiTok is published flat."""
    state, _ = read_safetensors(GOLDEN / "llamagen" / "weights_vq.safetensors")
    torch.save({"first": state, "second": state}, tmp_path / "titok.bin")
    with pytest.raises(
        UserError, match="several sets of weights .first, second.; choose one with --key"
    ):
        main(["import", "titok", str(tmp_path / "titok.bin"), "--out", str(tmp_path / "out")])


def test_a_teacher_takes_averaged_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tessellar")
    options: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    state = VisionModel("test_vit", options=options).network.state_dict()
    torch.save(
        {"state_dict": state, "state_dict_ema": averaged(state), "epoch": 1}, tmp_path / "timm.pth"
    )
    torch.save({"model": state}, tmp_path / "plain.pth")
    model = VisionModel("test_vit", str(tmp_path / "timm.pth"), options=options)
    assert torch.equal(model.network.state_dict()["norm.weight"], state["norm.weight"] + 1)
    assert any("'state_dict_ema' is taken, not state_dict" in line for line in caplog.messages)
    caplog.clear()
    VisionModel("test_vit", str(tmp_path / "plain.pth"), options=options)
    assert not any("is taken" in line for line in caplog.messages)
