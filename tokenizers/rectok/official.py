"""RecTok's checkpoints (arXiv 2512.13421), `RecTok.pth` and `RecTok_decft.pth`: official keys to ours
and back.

Sizes are read from the tensors' shapes, heads from the published widths unless they are given. The
statistics that normalise tokens are not in the file: they stay 0 and 1 until they are measured.
"""

import re
from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import Rule, table
from tessellar.interop.sizes import convolution, count, matrix
from tessellar.tokenizers.rectok.bottleneck import ChannelBottleneck
from tessellar.tokenizers.rectok.tokenizer import TINY, RecTok
from tessellar.tokenizers.titok.official import patch_convolution, patch_matrix
from tessellar.tokenizers.titok.tokenizer import ViTSize

HEADS = {192: 4, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16}
SEMANTIC = "sem_decoders.dinov3"
SIDES = {"encoder": "encoder", "decoder": "decoder", SEMANTIC: "semantic_decoder"}


def _of_all_sides() -> dict[str, str]:
    pairs = {}
    for theirs, ours in SIDES.items():
        pairs |= {
            f"{theirs}.positional_embedding": f"{ours}.positions",
            f"{theirs}.ln_pre.weight": f"{ours}.norm_in.weight",
            f"{theirs}.ln_post.weight": f"{ours}.norm_out.weight",
            f"{theirs}.transformer.{{i}}.norm{{n}}.weight": f"{ours}.blocks.{{i}}.norm{{n}}.weight",
        }
    return pairs


def _blocks() -> tuple[Rule, ...]:
    """Layers of blocks, each under its own name, so that the way back tells them apart."""
    rules = []
    for theirs, ours in SIDES.items():
        for group, layers in (
            ("attn", ("qkv", "proj", "q_norm", "k_norm")),
            ("mlp", ("w12", "w3")),
        ):
            for layer in layers:
                rules.append(
                    Rule(
                        f"{theirs}.transformer.{{i}}.{group}.{layer}.{{tensor}}",
                        f"{ours}.blocks.{{i}}.{layer}.{{tensor}}",
                    )
                )
    return tuple(rules)


KEYS = table(
    {
        **_of_all_sides(),
        "encoder.patch_embed.0.bias": "encoder.patch_in.bias",
        "encoder.latent_head.{tensor}": "encoder.to_moments.{tensor}",
        "decoder.mask_token": "decoder.hidden",
        "decoder.decoder_embed.{tensor}": "decoder.from_latent.{tensor}",
        "decoder.ffn.1.bias": "decoder.to_pixels.bias",
        "decoder.conv_out.{tensor}": "decoder.conv_out.{tensor}",
        f"{SEMANTIC}.mask_embedding": "semantic_decoder.hidden",
        f"{SEMANTIC}.token_embedding.{{tensor}}": "semantic_decoder.from_latent.{tensor}",
        f"{SEMANTIC}.out.{{tensor}}": "semantic_decoder.out.{tensor}",
    },
    Rule("encoder.patch_embed.0.weight", "encoder.patch_in.weight", patch_matrix, patch_convolution),
    Rule("decoder.ffn.1.weight", "decoder.to_pixels.weight", matrix, convolution),
    *_blocks(),
    drop=("sem_foundation_models.*",),
)  # fmt: skip


def size_of(state: Mapping[str, Tensor], part: str, heads: int | None) -> ViTSize:
    """Of a transformer; raises UserError for a width that is none of the published ones."""
    width = state[f"{part}.positional_embedding"].shape[-1]
    if heads is None and width not in HEADS:
        raise UserError(f"the number of heads of width {width} is not known: give --num_heads")
    depth = count(state, re.escape(part) + r"\.transformer\.(\d+)\.")
    return ViTSize(width, depth, heads or HEADS[width])


def from_official(
    state: Mapping[str, Tensor],
    heads: tuple[int, int] | None = None,
    semantic_heads: int | None = None,
    where: str = "",
) -> RecTok:
    """A tokenizer with the sizes that the weights show, filled with them; `heads` are the encoder's
    and the decoder's.
    """
    OFFICIAL.check(state)
    patch_size = state["encoder.patch_embed.0.weight"].shape[-1]
    side = isqrt(state["encoder.positional_embedding"].shape[1])
    out = state.get(f"{SEMANTIC}.out.bias")
    made = RecTok(
        ChannelBottleneck(len(state["encoder.latent_head.bias"]) // 2),
        side * patch_size,
        patch_size,
        semantic_dim=None if out is None else len(out),
        qk_norm="encoder.transformer.0.attn.q_norm.weight" in state,
        encoder_size=size_of(state, "encoder", heads and heads[0]),
        decoder_size=size_of(state, "decoder", heads and heads[1]),
        semantic_size=TINY if out is None else size_of(state, SEMANTIC, semantic_heads),
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: RecTok) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> RecTok:
    return from_official(state, options.heads)


OFFICIAL = TokenizerImporter(
    what="a RecTok tokenizer",
    marks=("encoder.latent_head.weight", "decoder.decoder_embed.weight", "encoder.ln_pre.weight"),
    entries=("model_ema", "model"),
    keys=KEYS,
    own=("quantizer.*",),
    build=_build,
)
