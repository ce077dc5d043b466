"""LlamaGen's official GPT files: published sizes and key sets, the importer and its inverse, what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.llamagen import model as llamagen
from tessellar.models.llamagen.official import from_official, to_official
from tessellar.protocol.layout import Categorical, Layout, grid_layout
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.llamagen import official as llamagen_vq
from tessellar.tokenizers.llamagen import tokenizer as tokenizers

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
GRID = grid_layout(16, 16, Categorical(16384))


def official(part: str) -> dict[str, Tensor]:
    return read_safetensors(GOLDEN / f"weights_{part}.safetensors")[0]


def layout(part: str) -> Layout:
    return grid_layout(4, 4, Categorical({"c2i": 96, "t2i": 80}[part]))


def generator(part: str, **changes: Tensor) -> LlamaGen:
    return from_official({**official(part), **changes}, layout(part), {"c2i": 3, "t2i": 2}[part])


# preset, parameters, keys of the official state dict (specs of arXiv 2406.06525 and the released files)
PUBLISHED = {
    "llamagen_b": (110_888_448, 88),
    "llamagen_l": (342_910_976, 172),
    "llamagen_xl": (774_699_520, 256),
    "llamagen_xxl": (1_410_972_672, 340),
    "llamagen_3b": (3_096_659_200, 172),
    "llamagen_t2i_xl": (777_678_080, 258),
}
# width, depth, heads, parameters of the variants that the official code defines but nobody released
UNRELEASED = {
    "1B": (2048, 22, 32, 1_199_616_000),
    "XXXL": (2560, 48, 40, 3_893_027_840),
    "7B": (4096, 32, 32, 6_614_589_440),
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants(name: str) -> None:
    parameters, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(llamagen, name)(GRID)
    assert count(model) == parameters
    assert len(to_official(model)) == keys


@pytest.mark.parametrize("name", UNRELEASED)
def test_unreleased_variants(name: str) -> None:
    width, depth, heads, parameters = UNRELEASED[name]
    with torch.device("meta"):
        assert count(LlamaGen(GRID, width, depth, heads)) == parameters


def test_null_caption_is_a_buffer() -> None:
    with torch.device("meta"):
        model = llamagen.llamagen_t2i_xl(GRID)
    assert sum(b.numel() for name, b in model.named_buffers() if name.endswith("uncond")) == 245_760


def test_heads_of_published_sizes_are_known() -> None:
    """Width and depth tell the heads; the released files do not."""
    with torch.device("meta"):
        model = LlamaGen(grid_layout(4, 4, Categorical(50)), 768, 12, 12, ffn_multiple_of=256)
    state = {key: torch.zeros(t.shape) for key, t in to_official(model).items()}
    assert from_official(state, grid_layout(4, 4, Categorical(50))).num_heads == 12


@pytest.mark.parametrize("part", ["c2i", "t2i"])
def test_import_inverts_export(part: str) -> None:
    back = to_official(generator(part))
    assert back.keys() == official(part).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in official(part).items())


def test_saved_tables_and_caches_are_dropped_and_tell_the_heads() -> None:
    extra = {
        "freqs_cis": torch.zeros(17, 8, 2),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2, 3, 24, 16),
    }
    assert from_official({**official("c2i"), **extra}, layout("c2i")).num_heads == 3


def test_unknown_and_missing_keys_are_fatal() -> None:
    with pytest.raises(UserError, match="1 unknown: layers.0.attention.lora"):
        generator("c2i", **{"layers.0.attention.lora": torch.zeros(1)})
    state = official("c2i")
    del state["layers.2.ffn_norm.weight"]
    with pytest.raises(UserError, match="1 missing: layers.2.ffn_norm.weight"):
        from_official(state, layout("c2i"), 3)


def test_what_cannot_be_inferred_is_asked_for() -> None:
    with pytest.raises(UserError, match="width 48 and depth 3: give --num_heads"):
        from_official(official("c2i"), layout("c2i"))
    with pytest.raises(UserError, match="predicts 96 codes, but the tokenizer gives"):
        from_official(official("c2i"), layout("t2i"), 3)
    with pytest.raises(
        UserError, match="not the weights of a LlamaGen generator: tok_embeddings.weight"
    ):
        from_official({"encoder.weight": torch.zeros(1)}, layout("c2i"))


@pytest.mark.parametrize(
    ("preset", "parameters", "keys"), [("vq_16", 71_883_403, 344), ("vq_8", 70_109_835, 300)]
)
def test_published_tokenizers(preset: str, parameters: int, keys: int) -> None:
    """The official files have one key more, the queue of recent codes."""
    with torch.device("meta"):
        model = getattr(tokenizers, preset)()
    assert count(model) == parameters
    assert len(llamagen_vq.to_official(model)) == keys - 1


def test_import_inverts_export_of_a_tokenizer() -> None:
    theirs = official("vq")
    back = llamagen_vq.to_official(llamagen_vq.tokenizer_from_official(theirs, 8))
    assert theirs.keys() - back.keys() == {"quantize.codebook_used"}
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_a_tokenizer_is_read_strictly() -> None:
    with pytest.raises(UserError, match="1 unknown: encoder.extra"):
        llamagen_vq.tokenizer_from_official({**official("vq"), "encoder.extra": torch.zeros(1)}, 8)
    state = official("vq")
    del state["quant_conv.bias"]
    with pytest.raises(UserError, match="1 missing: quant_conv.bias"):
        llamagen_vq.tokenizer_from_official(state, 8)
    with pytest.raises(UserError, match="not the weights of a LlamaGen VQ tokenizer"):
        llamagen_vq.tokenizer_from_official(official("disc"), 8)
