"""`convert.py import SYSTEM` of another system's weights, or of its own with a tensor lost: one line, no traceback."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.importing import import_model, papers
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*/*weights*.safetensors"))
TAKEN = {  # of FILES, besides the system's own
    "titok": {"one_d_piece", "titok"},  # one format, told apart by the name
    "one_d_piece": {"one_d_piece", "titok"},
    "xar": {"mar"},  # one VAE
    "kl_vae": {"mar"},
    "tokenbridge": {"mar"},
    "lpd": {"llamagen"},  # its tokenizer
    "bitdance": {"bitdance_parallel"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export: a tokenizer of 16 codes, 96 in its book."""
    torch.manual_seed(0)
    return export_tokenizer(
        ViTVQ(VectorQuantizer(96, 4), 16, 4, 16, 1, 1, 2).eval(),
        tmp_path_factory.mktemp("vq") / "export",
    )


def refusal(system: str, file: Path, tokenizer: Path, heads: int | None = None) -> str:
    """What a user reads; empty where the weights are taken."""
    try:
        import_model(system, str(file), str(tokenizer), options=ImportOptions(num_heads=heads))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("system", papers())
def test_weights_of_another_system_are_refused_in_one_line(system: str, tokenizer: Path) -> None:
    for file in FILES:
        message = refusal(system, file, tokenizer, 2)
        own = {system, f"titok_{system}"} | TAKEN.get(system, set())
        assert len(message.splitlines()) == 1 or file.parent.name in own, file


def test_a_file_without_the_marks_is_refused_by_them(tokenizer: Path) -> None:
    """Before any tensor is looked at: what refuses it later says less."""
    message = refusal("rar", GOLDEN / "llamagen" / "weights_c2i.safetensors", tokenizer, 2)
    assert "holds nothing of rar: not the weights of" in message


@pytest.mark.parametrize("key", ["embeddings.weight", "pos_embed", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("change", [torch.flatten, torch.sum, lambda t: t[None]])
def test_tensors_of_another_rank_are_refused_in_one_line(
    key: str, change, tokenizer: Path, tmp_path: Path
) -> None:
    state, _ = read_safetensors(GOLDEN / "titok_rar/weights.safetensors")
    save_file({**state, key: change(state[key])}, tmp_path / "other.safetensors")
    assert len(refusal("rar", tmp_path / "other.safetensors", tokenizer).splitlines()) == 1


@pytest.mark.parametrize(
    ("system", "file"),
    [
        ("titok", "titok/weights_single"),
        ("alitok", "alitok/weights"),
        ("llamagen", "llamagen/weights_vq"),
        ("llamagen", "llamagen/weights_c2i"),
        ("rar", "titok_rar/weights"),
        ("retok", "retok/weights"),
        ("mar", "mar/vae_weights"),
    ],
)
def test_a_lost_tensor_is_told_in_one_line(
    system: str, file: str, tokenizer: Path, tmp_path: Path
) -> None:
    state, _ = read_safetensors(GOLDEN / f"{file}.safetensors")
    save_file(state, tmp_path / "whole.safetensors")
    assert refusal(system, tmp_path / "whole.safetensors", tokenizer, 2) == ""
    for key in sorted(state)[::11]:
        save_file({k: t for k, t in state.items() if k != key}, tmp_path / "lost.safetensors")
        assert (
            len(refusal(system, tmp_path / "lost.safetensors", tokenizer, 2).splitlines()) == 1
        ), key
