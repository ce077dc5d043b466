"""Options of a recording's config that a generator does not have are refused by name, not passed over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tessellar.parity.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
UNKNOWN = "the official option 'rotary_dim' is not known here"


@pytest.mark.parametrize(
    ("system", "case", "place", "options", "message"),
    [
        ("llamagen", "c2i", "c2i", {"cls_token_num": 4}, "cls_token_num is 4; only 1 is supported"),
        ("llamagen", "c2i", "c2i", {"n_kv_head": 1}, "n_kv_head 1 is not supported"),
        ("llamagen", "c2i", "c2i", {"rotary_dim": 8}, UNKNOWN),
        ("flextok_ar", "c2i", "", {"rotary_dim": 8}, UNKNOWN),
        ("flextok_ar", "c2i", "", {"depth": 9}, "depth is 9; the weights are of"),
        ("alitok", "gen_small_rope", "gen", {"rotary_dim": 8}, UNKNOWN),
        ("bitdance", "tf", "", {"rotary_dim": 8}, UNKNOWN),
        ("bitdance", "tf", "", {"n_layer": 9}, "n_layer is 9; the weights are of 2"),
        ("bitdance_parallel", "tf", "", {"parallel_mode": "standard"}, "only 'patch' is supported"),
        ("bitdance_parallel", "tf", "", {"parallel_num": 2}, "parallel_num is 2; the weights are"),
        ("bitdance_t2i_head", "head", "", {"use_swiglu": False}, "use_swiglu is False"),
        ("lpd", "tf", "", {"rotary_dim": 8}, UNKNOWN),
        ("lpd", "tf", "", {"decoder_depth": 9}, "decoder_depth is 9; the weights are of"),
        ("retok", "gen_train", "gpt", {"cls_token_num": 4}, "cls_token_num is 4"),
        ("mar", "gen_diffloss", "mar", {"rotary_dim": 8}, UNKNOWN),
        ("titok_rar", "gen_prefix", "", {"rotary_dim": 8}, UNKNOWN),
        ("titok_maskgit", "gen_vit_train", "", {"rotary_dim": 8}, UNKNOWN),
        (
            "token_shuffle",
            "shuffle",
            "",
            {"gelu": "tanh"},
            "gelu is 'tanh'; only 'erf' is supported",
        ),
        ("var", "greedy", "sample", {"more_smooth": True}, "more_smooth is True"),
        ("var", "greedy", "sample", {"top_k": 900}, "top_k is 900; only 1 is supported"),
        ("var", "train", "var", {"norm_eps": 1e-5}, "norm_eps is 1e-05"),
        ("var", "train", "var", {"attn_drop_rate": 0.1}, "attn_drop_rate is 0.1"),
        ("var", "train", "var", {"patch_nums": [1, 2]}, "patch_nums is [1, 2]; the weights"),
        ("tokenflow_t2i", "train", "", {"rotary_dim": 8}, UNKNOWN),
        ("tokenflow_t2i", "train", "", {"pad_id": 19}, "pad_id is 19; the weights are of 20"),
        ("xar", "sample", "", {"attn_dropout": 0.2}, "attn_dropout is 0.2; only 0.0"),
        ("llamagen", "c2i", "c2i", {"attn_dropout_p": 0.1}, "attn_dropout_p is 0.1; only 0.0"),
        ("llamagen", "c2i", "c2i", {"ffn_dropout_p": 0.2}, "ffn_dropout_p is 0.2; only 0.0"),
        ("flextok_ar", "c2i", "", {"pos_embed_type": "learned"}, "pos_embed_type is 'learned'"),
        ("flextok_ar", "c2i", "", {"qk_norm": False}, "qk_norm is False; the weights are of True"),
        ("restok", "gen_greedy_nocfg", "generator", {"spe_token_num": 3}, "spe_token_num is 3"),
        ("xar", "sample", "", {"patch_size": 2}, "patch_size is 2; only 1 is supported"),
        (
            "xar",
            "sample",
            "",
            {"decoder_num_heads": 2},
            "encoder_num_heads and decoder_num_heads must be equal",
        ),
        ("hita", "gen_greedy_nocfg", "generator", {"cls_token_num": 4}, "cls_token_num is 4"),
        ("restok", "gen_greedy_nocfg", "generator", {"cls_token_num": 4}, "cls_token_num is 4"),
    ],
)
def test_options_are_refused_by_name(
    tmp_path: Path, system: str, case: str, place: str, options: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(GOLDEN / system, tmp_path / system)
    meta = json.loads((folder / "meta.json").read_text())
    config = meta["config"][place] if place else meta["config"]
    config.update(options)
    (folder / "meta.json").write_text(json.dumps(meta))
    leftovers = verify(folder, [case]).leftovers
    assert any(message in line for line in leftovers), leftovers
