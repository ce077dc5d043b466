"""AliTok's tokenizers (arXiv 2506.05289): `AliTok.pth`, of the second stage, and training files of
both; keys to and fro.

Sizes are read from the tensors' shapes, and the stage from the decoder's first rows. Heads have 64
channels as published unless `num_heads` says otherwise.
"""

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import Rule, table
from tessellar.interop.sizes import convolution, count, heads_of, matrix
from tessellar.tokenizers.alitok.tokenizer import AliTok
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.official import (
    BLOCKS,
    of_both_sides,
    patch_convolution,
    patch_matrix,
)
from tessellar.tokenizers.titok.tokenizer import ViTSize

KEYS = table(
    of_both_sides(
        {**BLOCKS, "{side}.transformer.{i}.attn.in_proj.{tensor}": "{side}.blocks.{i}.qkv.{tensor}"}
    )
    | {
        "latent_tokens": "encoder.tokens",
        "encoder.positional_embedding": "encoder.positions",
        "encoder.latent_token_positional_embedding": "encoder.token_positions",
        "encoder.patch_embed.bias": "encoder.patch_in.bias",
        "encoder.conv_out.bias": "encoder.to_code.bias",
        "decoder.class_embedding": "decoder.first",
        "decoder.latent_token_positional_embedding": "decoder.positions",
        "decoder.decoder_embed.{tensor}": "decoder.from_code.{tensor}",
        "decoder.ffn.0.bias": "head.to_pixels.bias",
        "decoder.conv_out.{tensor}": "head.smooth.{tensor}",
        "decoder.ffn_aux.0.bias": "strip_head.to_pixels.bias",
        "decoder.conv_out_aux.{tensor}": "strip_head.smooth.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "quantize.embed_prob": "quantizer.shares",
    },
    Rule("encoder.patch_embed.weight", "encoder.patch_in.weight", patch_matrix, patch_convolution),
    Rule("encoder.conv_out.weight", "encoder.to_code.weight", matrix, convolution),
    Rule("decoder.ffn.0.weight", "head.to_pixels.weight", matrix, convolution),
    Rule("decoder.ffn_aux.0.weight", "strip_head.to_pixels.weight", matrix, convolution),
)


def from_official(
    state: Mapping[str, Tensor],
    heads: tuple[int, int] | None = None,
    prefix_weight: float | None = None,
    where: str = "",
) -> AliTok:
    """A tokenizer with the sizes that the weights show, filled with them; `heads` are the encoder's
    and the decoder's.

    Raises UserError for weights of something else.
    """
    OFFICIAL.check(state)
    width, _, patch_size, _ = state["encoder.patch_embed.weight"].shape
    decoder_width = len(state["decoder.decoder_embed.bias"])
    side = isqrt(len(state["encoder.positional_embedding"]))
    tokens = len(state["latent_tokens"])
    if tokens != side**2 + side + 1:
        raise UserError(
            f"these weights have {tokens} tokens for {side} x {side} patches; AliTok has {side**2 + side + 1}"
        )
    causal = "decoder.ffn_aux.0.weight" in state
    codes, dim = state["quantize.embedding.weight"].shape
    # Only files of the first stage hold how often codes were used.
    quantizer = (
        ClusteringVQ(codes, dim)
        if "quantize.embed_prob" in state
        else VectorQuantizer(codes, dim, l2_normalize=False)
    )
    encoder_depth = count(state, r"encoder\.transformer\.(\d+)\.")
    decoder_depth = count(state, r"decoder\.transformer\.(\d+)\.")
    encoder_heads, decoder_heads = heads or (None, None)
    made = AliTok(
        quantizer,
        side * patch_size,
        patch_size=patch_size,
        encoder_size=ViTSize(width, encoder_depth, heads_of(width, encoder_heads)),
        decoder_size=ViTSize(decoder_width, decoder_depth, heads_of(decoder_width, decoder_heads)),
        stage="causal" if causal else "bidirectional",
        buffer=len(state["decoder.class_embedding"]),
        prefix_weight=prefix_weight,
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: AliTok) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> AliTok:
    return from_official(state, options.heads)


OFFICIAL = TokenizerImporter(
    what="an AliTok tokenizer",
    marks=("latent_tokens", "encoder.transformer.0.attn.in_proj.weight"),
    entries=("model_state",),  # of a training file; the published file is the state dict itself
    keys=KEYS,
    own=("quantizer.step", "quantizer.counts"),
    build=_build,
)
