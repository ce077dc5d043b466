"""Options of a recording's config that a tokenizer does not have are refused by name, not passed over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tessellar.parity.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("system", "place", "options", "message"),
    [
        (
            "titok",
            "single",
            {"vit_dec_patch_size": 4},
            "vit_dec_patch_size is 4; the weights are of 8",
        ),
        ("titok", "single", {"rope": True}, "the official option 'rope' is not known here"),
        ("alitok", "tok", {"aux_tokens_num": 4}, "aux_tokens_num is 4; the weights are of"),
        ("alitok", "tok", {"rope": True}, "the official option 'rope' is not known here"),
        ("uniwetok", "ddconfig", {"double_z": True}, "double_z is True; only False is supported"),
        ("uniwetok", "ddconfig", {"attn_blocks": 3}, "attn_blocks is 3; the weights are of 1"),
        ("bitdance", "vae_ddconfig_override", {"ch": 64}, "ch is 64; the weights are of 32"),
        (
            "one_d_piece",
            "vq_model",
            {"strict_length_assertion": True},
            "strict_length_assertion is True",
        ),
        (
            "restok",
            "vq_model",
            {"reduction_ratio": 0.25},
            "reduction_ratio is 0.25; only 0.5 is supported",
        ),
        (
            "restok",
            "vq_model",
            {"hierarchy_stages": 3},
            "hierarchy_stages is 3; the weights are of 4",
        ),
        ("retok", "", {"use_attn": True}, "use_attn is True; only False is supported"),
        ("hita", "tokenizer.encoder_decoder_transformers", {"dim_head": 8}, "dim_head is 8"),
        ("hita", "tokenizer.encoder_decoder_transformers", {"n_carrier": 3}, "n_carrier is 3"),
        ("hita", "tokenizer.cnn", {"groups": 16}, "groups is 16; only 32 is supported"),
        ("hita", "tokenizer", {"rope": True}, "the official option 'rope' is not known here"),
        ("titok", "vqgan", {"dropout": 0.1}, "dropout is 0.1; only 0.0 is supported"),
        (
            "flextok",
            "decoder.module_dict.dec_noise_patch_emb",
            {"patch_sizes": [1, 1]},
            "patch_sizes is [1, 1]; only [2, 2] is supported",
        ),
        (
            "flextok",
            "decoder.module_dict.dec_time_embedder",
            {"frequency_embedding_size": 128},
            "frequency_embedding_size is 128; only 256",
        ),
        ("hita", "vfm", {"mlp_ratio": 2}, "mlp_ratio is 2; only 4 is supported"),
        ("retok", "", {"keep_tokens": 1}, "keep_tokens is 1; the weights are of"),
        ("retok", "", {"rope": True}, "the official option 'rope' is not known here"),
        ("restok", "vq_model", {"vit_dec_patch_size": 8}, "vit_dec_patch_size is 8; the weights"),
        ("restok", "cnn", {"groups": 16}, "groups is 16; only 32 is supported"),
        ("mar", "vae", {"encoder_attn_resolutions": [32]}, "the weights attend at"),
        ("var", "vae", {"test_mode": False}, "test_mode is False"),
        ("mingtok", "mingtok.low_level_encoder", {"depth": 3}, "depth is 3; the weights are of 2"),
        ("mingtok", "mingtok.semantic_decoder", {"ffn_layer": "mlp"}, "ffn_layer is 'mlp'"),
        ("mingtok", "mingtok.pixel_decoder", {"loss_type": "L2"}, "loss_type is 'L2'"),
        ("rectok", "", {"token_channels": 64}, "token_channels is 64; the weights are of 320"),
        ("rectok", "", {"foundation_model_type": "siglip"}, "foundation_model_type is 'siglip'"),
        ("seed", "", {"num_query": 16}, "num_query is 16; the weights are of 32"),
        ("seed", "", {"cross_attention_freq": 1}, "cross_attention_freq is 1; only 2 is supported"),
        ("tokenflow", "", {"semantic_out_dim": 20}, "the weights are of 24"),
        ("tokenflow", "", {"enhanced_decoder": True}, "enhanced_decoder is True"),
        ("llamagen", "vq", {"norm_type": "batch"}, "norm_type is 'batch'"),
        ("llamagen", "loss", {"lecam": 0.1}, "the official option 'lecam' is not known here"),
    ],
)
def test_options_are_refused_by_name(
    tmp_path: Path, system: str, place: str, options: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(GOLDEN / system, tmp_path / system)
    meta = json.loads((folder / "meta.json").read_text())
    config = meta["config"]
    for name in place.split(".") if place else ():
        config = config[name]
    config.update(options)
    (folder / "meta.json").write_text(json.dumps(meta))
    case = CASES[system] if place != "loss" else "loss_plain"
    leftovers = verify(folder, [case]).leftovers
    assert any(message in line for line in leftovers), leftovers


CASES = {
    "titok": "tok_single",
    "flextok": "enc",
    "alitok": "tok_decode_ids",
    "one_d_piece": "encode",
    "restok": "tok_train",
    "retok": "tok_encode",
    "hita": "tok_main",
    "mar": "vae_main",
    "tokenflow": "interp",
    "mingtok": "tok",
    "rectok": "enc",
    "seed": "tok",
    "var": "vae",
    "llamagen": "vq",
    "uniwetok": "sq",
    "bitdance": "vae",
}
