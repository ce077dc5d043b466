"""The checkpoints of ReToK's tokenizer (arXiv 2601.01535), official keys to ours and back. (The
GPT: models/retok.)

Sizes are read from the tensors' shapes; the number of heads is known for the published widths, else
`num_heads` is needed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import Rule, table
from tessellar.interop.sizes import cnn_sizes, convolution, count, matrix
from tessellar.tokenizers.llamagen.official import decoder_multipliers
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok.qformer import SIZES, QFormerSize
from tessellar.tokenizers.retok.tokenizer import ReToK


def without_batch(t: Tensor) -> Tensor:
    return t[:, 0]


def with_batch(t: Tensor) -> Tensor:
    return t[:, None]


_CNN = {
    "{side}.conv_in.{tensor}": "{side}.conv_in.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.nin_shortcut.{tensor}": "{side}.levels.{i}.res.{j}.shortcut.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.{layer}.{tensor}": "{side}.levels.{i}.res.{j}.{layer}.{tensor}",
    "{side}.mid.{i}.{layer}.{tensor}": "{side}.mid.{i}.{layer}.{tensor}",
    "{side}.norm_out.{tensor}": "{side}.norm_out.{tensor}",
    "{side}.conv_out.{tensor}": "{side}.conv_out.{tensor}",
}


_LAYERS = {
    "{side}.transformer.{i}.self_attn.in_proj_{tensor}": "{ours}.layers.{i}.self_attention.qkv.{tensor}",
    "{side}.transformer.{i}.self_attn.out_proj.{tensor}": "{ours}.layers.{i}.self_attention.proj.{tensor}",
    "{side}.transformer.{i}.multihead_attn.in_proj_{tensor}": "{ours}.layers.{i}.cross_attention.qkv.{tensor}",
    "{side}.transformer.{i}.multihead_attn.out_proj.{tensor}": "{ours}.layers.{i}.cross_attention.proj.{tensor}",
    "{side}.transformer.{i}.linear1.{tensor}": "{ours}.layers.{i}.fc1.{tensor}",
    "{side}.transformer.{i}.linear2.{tensor}": "{ours}.layers.{i}.fc2.{tensor}",
    "{side}.transformer.{i}.{norm}.{tensor}": "{ours}.layers.{i}.{norm}.{tensor}",
    "{side}.ln_pre.{tensor}": "{ours}.norm_in.{tensor}",
    "{side}.ln_post.{tensor}": "{ours}.norm_out.{tensor}",
}


# Their 1x1 convolutions are our linear layers.
_MATRICES = {
    "s2to1encoder.conv_out.weight": "token_encoder.out.weight",
    "quant_conv.weight": "to_code.weight",
    "post_quant_conv.weight": "from_code.weight",
}


# Theirs are [N, 1, D], with an axis for the batch behind the sequence; ours [N, D].
_POSITIONS = {
    "s2to1encoder.positional_embedding": "token_encoder.memory_positions",
    "s2to1encoder.latent_token_positional_embedding": "token_encoder.positions",
    "s2to1encoder.latent_token_positional_embedding_comp": "token_encoder.redundant_positions",
    "s1to2decoder.positional_embedding": "token_decoder.positions",
    "s1to2decoder.latent_token_positional_embedding": "token_decoder.memory_positions",
    "s1to2decoder.latent_token_positional_embedding_comp": "token_decoder.redundant_positions",
}


def _named(pairs: Mapping[str, str], side: str, ours: str) -> dict[str, str]:
    """The table of one side: `side` in their names, `ours` in those of our Q-Formers."""
    named = {}
    for theirs, here in pairs.items():
        here = here.replace("{side}", side).replace("{ours}", ours)
        named[theirs.replace("{side}", side)] = here
    return named


KEYS = table(
    {
        **_named(_CNN, "encoder", ""),
        **_named(_CNN, "decoder", ""),
        "encoder.conv_blocks.{i}.downsample.conv.{tensor}": "encoder.levels.{i}.resample.conv.{tensor}",
        "decoder.conv_blocks.{i}.upsample.conv1.{tensor}": "decoder.levels.{i}.upsample.conv.{tensor}",
        "decoder.adaptive.{i}.{layer}.{tensor}": "decoder.levels.{i}.adaptive.{layer}.{tensor}",
        **_named(_LAYERS, "s2to1encoder", "token_encoder"),
        **_named(_LAYERS, "s1to2decoder", "token_decoder"),
        "s2to1encoder.encoder_embed.{tensor}": "token_encoder.embed.{tensor}",
        "s2to1encoder.global_proj.{tensor}": "token_encoder.project.{tensor}",
        "s2to1encoder.conv_out.bias": "token_encoder.out.bias",
        "s1to2decoder.decoder_embed.{tensor}": "token_decoder.embed.{tensor}",
        "s1to2decoder.conv_out.{tensor}": "token_decoder.conv_out.{tensor}",
        "s1to2decoder.distill_mlp.{i}.{tensor}": "token_decoder.semantic.{i}.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "quant_conv.bias": "to_code.bias",
        "post_quant_conv.bias": "from_code.bias",
    },
    *(Rule(theirs, ours, matrix, convolution) for theirs, ours in _MATRICES.items()),
    *(Rule(theirs, ours, without_batch, with_batch) for theirs, ours in _POSITIONS.items()),
    drop=("quantize.codebook_used",),
)


def load_official(
    tokenizer: ReToK, state: Mapping[str, Tensor], where: str = "the checkpoint"
) -> ReToK:
    """Official weights into a tokenizer of the same sizes, strictly."""
    return OFFICIAL.fill(tokenizer, state, where)


def to_official(tokenizer: ReToK) -> dict[str, Tensor]:
    """Official state dict of a tokenizer (without their usage counter)."""
    return OFFICIAL.to_official(tokenizer)


def tokenizer_from_official(
    state: Mapping[str, Tensor],
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    semantic_layer: int | None = None,
    **options: Any,
) -> ReToK:
    """A tokenizer with the sizes that the weights show, filled with them; `options` are more
    arguments of ReToK.
    """
    OFFICIAL.check(state)
    cnn = cnn_sizes(state, "encoder.conv_blocks.{i}.res.{j}", len(state["encoder.conv_in.weight"]))
    tokens = len(state["s2to1encoder.latent_token_positional_embedding"])
    redundant = len(state["s2to1encoder.latent_token_positional_embedding_comp"])
    side = round(len(state["s1to2decoder.positional_embedding"]) ** 0.5)
    semantic = state.get("s1to2decoder.distill_mlp.4.bias")
    decoder = _size(state, "s1to2decoder", decoder_heads)
    vocab, dim = state["quantize.embedding.weight"].shape
    options.setdefault("quantizer", VectorQuantizer(vocab, dim, rotation=True))
    tokenizer = ReToK(
        image_size=side * 2 ** (cnn.levels - 1),
        num_tokens=tokens,
        always=tokens - redundant,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
        z_channels=len(state["encoder.conv_out.weight"]),
        encoder_size=_size(state, "s2to1encoder", encoder_heads),
        decoder_size=decoder,
        semantic_dim=None if semantic is None else len(semantic),
        semantic_layer=semantic_layer or min(3, decoder.depth),
        decoder_multipliers=decoder_multipliers(state, "decoder.conv_blocks.{i}.res.{j}", cnn),
        **options,
    )
    return load_official(tokenizer, state)


def _size(state: Mapping[str, Tensor], side: str, heads: int | None) -> QFormerSize:
    width = len(state[f"{side}.ln_post.weight"])
    depth = count(state, rf"{side}\.transformer\.(\d+)\.")
    if heads is not None:
        return QFormerSize(width, depth, heads)
    for size in SIZES.values():
        if size.width == width:
            return replace(size, depth=depth)
    raise UserError(
        f"no published ReToK tokenizer has a Q-Former of width {width}: give --num_heads"
    )


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> ReToK:
    if options.heads is None:
        return tokenizer_from_official(state)
    return tokenizer_from_official(state, *options.heads)


OFFICIAL = TokenizerImporter(
    what="a ReToK tokenizer",
    marks=("encoder.conv_in.weight", "s1to2decoder.positional_embedding"),
    entries=("ema", "model", "state_dict"),  # the official scripts load the average
    keys=KEYS,
    own=("passes", "quantizer.step", "quantizer.counts"),
    build=_build,
)
