"""ResTok's checkpoints (arXiv 2601.03955), official keys to ours and back. (The generator:
models/har.)

Sizes are read from the tensors' shapes; heads are those of 64 channels and otherwise an argument.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.maskgit_cnn import half, upsampling
from tessellar.interop.sizes import cnn_sizes, convolution, count, heads_of, matrix
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.restok.tokenizer import ResTok

_BLOCK = {
    "attn.qkv.weight": "qkv.weight",
    "attn.q_bias": "q_bias",
    "attn.v_bias": "v_bias",
    # Spelled out: ours have no prefix that would tell the way back.
    "attn.proj.{tensor}": "proj.{tensor}",
    "attn.q_norm.{tensor}": "q_norm.{tensor}",
    "attn.k_norm.{tensor}": "k_norm.{tensor}",
    "mlp.fc1.{tensor}": "fc1.{tensor}",
    "mlp.fc2.{tensor}": "fc2.{tensor}",
    "gamma_1": "gamma_1",
    "gamma_2": "gamma_2",
    "{norm}.{tensor}": "{norm}.{tensor}",
}


def keys(levels: int) -> KeyTable:
    """The table of a tokenizer whose CNN has that many levels."""
    pairs = {
        **half("pixel_encoder", "cnn_encoder", "down"),
        **half("pixel_decoder", "cnn_decoder", "up"),
        **upsampling("pixel_decoder", "cnn_decoder", levels),
    }
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}.blocks.{{i}}.{a}": f"{side}.blocks.{{i}}.{b}" for a, b in _BLOCK.items()}
        pairs |= {
            f"{side}.ln_pre.{{tensor}}": f"{side}.norm_in.{{tensor}}",
            f"{side}.ln_post.{{tensor}}": f"{side}.norm_out.{{tensor}}",
            f"{side}.latent_token_level_embedding.{{i}}": f"{side}.level_embeddings.{{i}}",
        }
    pairs |= {
        "encoder.patch_embed.{tensor}": "encoder.project.{tensor}",
        "encoder.level_embedding.{i}": "encoder.scale_embeddings.{i}",
        "encoder.conv_out.{i}.bias": "to_code.{i}.bias",
        "decoder.latent_mask_token": "decoder.mask_code",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.feat_mask_token": "decoder.feature_token",
        "decoder.decoder_embed.{i}.{tensor}": "decoder.inputs.{i}.{tensor}",
        "decoder.ffn.{tensor}": "decoder.output.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
    }
    own = (
        Rule(
            "encoder.conv_out.{i}.weight",
            "to_code.{i}.weight",
            lambda t: t[..., 0],
            lambda t: t[..., None],
        ),
        Rule("vf_proj.weight", "encoder_to_vision.weight", matrix, convolution),
        Rule("vf_proj_dec.weight", "decoder_to_vision.weight", matrix, convolution),
    )
    return KeyTable((*own, *table(pairs).rules), ("foundation_model.*",))


def from_official(
    state: Mapping[str, Tensor],
    image_size: int = 256,
    heads: tuple[int, int] | None = None,
    min_tokens: int = 4,
    drop: float = 0.2,
    legacy: bool = True,
    vision_margin: float = 0.25,
    quantizer_options: Mapping[str, Any] | None = None,
    where: str = "the ResTok checkpoint",
) -> ResTok:
    """A tokenizer of the sizes that the weights show; `heads` of encoder and decoder are not among
    them.
    """
    OFFICIAL.check(state)
    cnn = cnn_sizes(
        state, "pixel_encoder.down.{i}.block.{j}", len(state["pixel_encoder.conv_in.weight"])
    )
    encoder = state["encoder.ln_pre.weight"].shape[0]
    decoder = state["decoder.ln_pre.weight"].shape[0]
    num_heads = heads or (heads_of(encoder), heads_of(decoder))
    length = 2 ** (count(state, r"encoder\.latent_token_level_embedding\.(\d+)") - 1)
    # without the decoder's feature token, projections alone are of no use: they stay out
    has_vision = {"vf_proj.weight", "vf_proj_dec.weight", "decoder.feat_mask_token"} <= set(state)
    loose = (
        () if has_vision else ("vf_proj.weight", "vf_proj_dec.weight", "decoder.feat_mask_token")
    )
    vocab_size, dim = state["quantize.embedding.weight"].shape
    made = ResTok(
        VectorQuantizer(vocab_size, dim, **(quantizer_options or {})),
        image_size,
        num_tokens=length,
        min_tokens=min_tokens,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
        z_channels=state["pixel_encoder.conv_out.weight"].shape[0],
        encoder_width=encoder,
        encoder_depth=count(state, r"encoder\.blocks\.(\d+)\."),
        encoder_heads=num_heads[0],
        decoder_width=decoder,
        decoder_depth=count(state, r"decoder\.blocks\.(\d+)\."),
        decoder_heads=num_heads[1],
        stages=count(state, r"encoder\.level_embedding\.(\d+)"),
        drop=drop,
        legacy=legacy,
        vision_dim=state["vf_proj.weight"].shape[0] if has_vision else None,
        vision_margin=vision_margin,
    )
    kept = {name: tensor for name, tensor in state.items() if name not in loose}
    return OFFICIAL.fill(made, kept, where)


def to_official(tokenizer: ResTok) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _keys_of(tokenizer: ResTok) -> KeyTable:
    return keys(len(tokenizer.cnn_encoder.levels))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> ResTok:
    return from_official(state, options.image_size or 256, options.heads)


OFFICIAL = TokenizerImporter(
    what="a ResTok tokenizer",
    marks=("encoder.level_embedding.0", "pixel_encoder.conv_in.weight"),
    entries=FLAT,
    keys=_keys_of,
    own=("quantizer.step", "quantizer.counts"),
    build=_build,
)
