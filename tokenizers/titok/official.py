"""TiTok's checkpoints (arXiv 2406.07550, 2501.07730), which One-D-Piece's share (arXiv 2501.10064):
keys to and fro.

Tokenizers of all kinds (two-stage, single-stage, KL) and the discriminator. Sizes are read from the
tensors' shapes; heads have 64 channels as published unless `num_heads` says otherwise. Old
two-stage weights (with a head of scores) mix tokens, the others do not.
"""

from collections.abc import Mapping
from math import isqrt

from einops import rearrange
from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.maskgit_cnn import half, upsampling
from tessellar.interop.sizes import cnn_sizes, convolution, count, heads_of, matrix
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.losses.blur_discriminator import BlurDiscriminator
from tessellar.tokenizers.maskgit_vqgan import PixelDecoder
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.tokenizer import Stage, TiTok, ViTSize


def patch_matrix(t: Tensor) -> Tensor:
    """The weight of a convolution over whole patches as that of a linear layer."""
    return rearrange(t, "d c p q -> d (c p q)")


def patch_convolution(t: Tensor) -> Tensor:
    """The inverse of `patch_matrix`."""
    return rearrange(t, "d (c p q) -> d c p q", c=3, p=isqrt(t.shape[1] // 3))


# What AliTok's halves are called too.
BLOCKS = {
    "{side}.ln_pre.{tensor}": "{side}.norm_in.{tensor}",
    "{side}.ln_post.{tensor}": "{side}.norm_out.{tensor}",
    "{side}.transformer.{i}.ln_1.{tensor}": "{side}.blocks.{i}.attention_norm.{tensor}",
    "{side}.transformer.{i}.ln_2.{tensor}": "{side}.blocks.{i}.mlp_norm.{tensor}",
    "{side}.transformer.{i}.attn.out_proj.{tensor}": "{side}.blocks.{i}.proj.{tensor}",
    "{side}.transformer.{i}.mlp.c_fc.{tensor}": "{side}.blocks.{i}.fc1.{tensor}",
    "{side}.transformer.{i}.mlp.c_proj.{tensor}": "{side}.blocks.{i}.fc2.{tensor}",
}
_TRANSFORMER = BLOCKS | {
    "{side}.class_embedding": "{side}.class_token",
    "{side}.positional_embedding": "{side}.positions",
    "{side}.latent_token_positional_embedding": "{side}.token_positions",
    "{side}.transformer.{i}.attn.in_proj_{tensor}": "{side}.blocks.{i}.qkv.{tensor}",
}


def of_both_sides(pairs: Mapping[str, str]) -> dict[str, str]:
    """Pairs of keys of one half, `{side}`, as those of the encoder and of the decoder."""
    return {
        theirs.replace("{side}", side): ours.replace("{side}", side)
        for side in ("encoder", "decoder")
        for theirs, ours in pairs.items()
    }


def keys(levels: int = 0) -> KeyTable:
    """The table of a tokenizer whose pixel decoder has that many levels (0: it has none)."""
    pairs = of_both_sides(_TRANSFORMER) | {
        "latent_tokens": "encoder.tokens",
        "encoder.patch_embed.bias": "encoder.patch_in.bias",
        "encoder.conv_out.bias": "encoder.to_code.bias",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.decoder_embed.{tensor}": "decoder.from_code.{tensor}",
        "decoder.ffn.{i}.bias": "decoder.head.{i}.bias",
        "decoder.conv_out.{tensor}": "smooth.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "quantize.embed_prob": "quantizer.shares",
        "pixel_quantize.embedding.weight": "pixels.codebook.weight",
        **half("pixel_decoder", "pixels.decoder", "up"),
        **upsampling("pixel_decoder", "pixels.decoder", levels),
    }
    return table(
        pairs,
        Rule(
            "encoder.patch_embed.weight", "encoder.patch_in.weight", patch_matrix, patch_convolution
        ),
        Rule("encoder.conv_out.weight", "encoder.to_code.weight", matrix, convolution),
        Rule("decoder.ffn.{i}.weight", "decoder.head.{i}.weight", matrix, convolution),
    )


DISCRIMINATOR_KEYS = table(
    {
        "block_in.{i}.{tensor}": "first.{i}.{tensor}",
        "blocks.{i}.{j}.{tensor}": "stages.{i}.{j}.{tensor}",
        "to_logits.{i}.{tensor}": "to_logits.{i}.{tensor}",
    }
)


def load_official(
    tokenizer: TiTok, state: Mapping[str, Tensor], where: str = "the checkpoint"
) -> TiTok:
    """Official weights into a tokenizer of the same sizes, strictly."""
    return OFFICIAL.fill(tokenizer, state, where)


def to_official(tokenizer: TiTok) -> dict[str, Tensor]:
    """Official state dict of a tokenizer."""
    return OFFICIAL.to_official(tokenizer)


def tokenizer_from_official(
    state: Mapping[str, Tensor],
    heads: tuple[int, int] | None = None,
    quantizer: Quantizer | None = None,
    mixes: bool | None = None,
    stage: Stage = "decoder",
    kind: type[TiTok] = TiTok,
) -> TiTok:
    """A tokenizer of class `kind` with the sizes that the weights show, filled with them.

    `heads` are the encoder's and the decoder's; `quantizer` replaces the one that the shapes tell;
    `mixes` None: as published. Raises UserError for weights of something else, and for a first
    stage without its VQGAN.
    """
    OFFICIAL.check(state)
    if "decoder.ffn.2.weight" in state and "pixel_quantize.embedding.weight" not in state:
        raise UserError(
            "these are the weights of the first stage, which cannot draw images: add the MaskGIT-VQGAN's decoder.* and "
            "quantize.* to them as pixel_decoder.* and pixel_quantize.*"
        )
    width, _, patch_size, _ = state["encoder.patch_embed.weight"].shape
    decoder_width = len(state["decoder.decoder_embed.bias"])
    two_stage = "decoder.ffn.2.weight" in state
    sizes = [
        ViTSize(
            wide,
            count(state, rf"{side}\.transformer\.(\d+)\."),
            heads_of(wide, heads[n] if heads else None),
        )
        for n, (side, wide) in enumerate((("encoder", width), ("decoder", decoder_width)))
    ]
    tokens = len(state["latent_tokens"])
    image_size = _side(state, "encoder") * patch_size
    decoder_patch_size = image_size // _side(state, "decoder")
    made = kind(
        quantizer or quantizer_of(state, two_stage, tokens),
        image_size,
        patch_size=patch_size,
        num_tokens=tokens,
        encoder_size=sizes[0],
        decoder_size=sizes[1],
        pixels=pixels_of(state) if two_stage else None,
        mixes=two_stage if mixes is None else mixes,
        stage=stage if two_stage else "all",
        decoder_patch_size=None if decoder_patch_size == patch_size else decoder_patch_size,
    )
    return load_official(made, state)


def _side(state: Mapping[str, Tensor], half: str) -> int:
    """Cells along a side of the map that the encoder reads, or that the decoder draws."""
    return isqrt(len(state[f"{half}.positional_embedding"]) - 1)


def quantizer_of(state: Mapping[str, Tensor], two_stage: bool, tokens: int) -> Quantizer:
    """As published: two-stage codes are on the unit sphere, single-stage ones are not."""
    if "quantize.embedding.weight" in state:
        vocab, dim = state["quantize.embedding.weight"].shape
        return VectorQuantizer(vocab, dim, l2_normalize=two_stage)
    dim = state["decoder.decoder_embed.weight"].shape[1]
    return GaussianBottleneck(dim, kl_weight=1e-6 * dim * tokens, scale=1.0)


def pixels_of(state: Mapping[str, Tensor]) -> PixelDecoder:
    vocab, dim = state["pixel_quantize.embedding.weight"].shape
    cnn = cnn_sizes(state, "pixel_decoder.up.{i}.block.{j}")
    return PixelDecoder(vocab, dim, cnn.channels, cnn.multipliers, cnn.blocks)


def discriminator_from_official(state: Mapping[str, Tensor], pool: int = 16) -> BlurDiscriminator:
    """The discriminator of the second stage, of keys without the prefix of the loss module."""
    stages = count(state, r"blocks\.(\d+)\.")
    side = state["blocks.0.1.kernel"].shape[-1]
    made = BlurDiscriminator(len(state["block_in.0.bias"]), stages, pool, (1.0,) * side)
    load_strict(
        made, DISCRIMINATOR_KEYS.from_official(state, "the discriminator"), "the discriminator"
    )
    return made.eval()


def _keys_of(tokenizer: TiTok) -> KeyTable:
    levels = len(tokenizer.pixels.decoder.levels) if tokenizer.pixels else 0
    return keys(levels)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> TiTok:
    return tokenizer_from_official(state, options.heads)


OFFICIAL = TokenizerImporter(
    what="a TiTok tokenizer",
    marks=("latent_tokens", "encoder.patch_embed.weight"),
    entries=FLAT,
    keys=_keys_of,
    own=tuple(f"quantizer.{name}" for name in ("step", "counts", "scale", "moments", "passes")),
    build=_build,
)
