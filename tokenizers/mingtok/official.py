"""MingTok's checkpoints (arXiv 2510.06590): `MingTok-Vision`, and the tokenizer inside
`Ming-UniVision-16B-A3B` (`vision.*`), official keys to ours and back.

Sizes are read from the tensors' shapes; heads have 64 channels unless `num_heads` says otherwise. The
mean and the deviation of latents are in no file of weights: they come from the config.json beside it,
or are the published ones.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import Rule, table
from tessellar.interop.sizes import count, heads_of
from tessellar.plain_data import parse_json
from tessellar.tokenizers.mingtok.tokenizer import PUBLISHED, MingTok
from tessellar.tokenizers.mingtok.transformers import FINER
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.titok.official import patch_convolution, patch_matrix
from tessellar.tokenizers.titok.tokenizer import ViTSize

INSIDE = "vision."
PARTS = {
    "low_level_encoder": "encoder",
    "semantic_decoder": "semantic_decoder",
    "pixel_decoder": "pixel_decoder",
}
#: Official layers of an MLP to ours; both kinds are told apart by their names.
MLPS = {"w12": "w1", "w3": "w2", "fc1": "fc1", "fc2": "fc2"}


def _blocks() -> dict[str, str]:
    pairs = {}
    for part, ours in PARTS.items():
        theirs = f"{part}.blocks.0.{{i}}"
        layer = f"{ours}.blocks.layers.{{i}}"
        for norm in ("norm1", "norm2"):
            pairs[f"{theirs}.{norm}.{{tensor}}"] = f"{layer}.{norm}.{{tensor}}"
        for linear in ("qkv", "proj"):
            pairs[f"{theirs}.attn.{linear}.{{tensor}}"] = f"{layer}.{linear}.{{tensor}}"
        for name, own in MLPS.items():
            pairs[f"{theirs}.mlp.{name}.{{tensor}}"] = f"{layer}.mlp.{own}.{{tensor}}"
    return pairs


KEYS = table(
    {
        "low_level_encoder.cls_token": "encoder.class_token",
        "low_level_encoder.pos_embed": "encoder.positions",
        "low_level_encoder.patch_embed.proj.bias": "encoder.patch_in.bias",
        "low_level_encoder.out_norm.{tensor}": "encoder.norm_out.{tensor}",
        "low_level_encoder.out_proj.{tensor}": "encoder.to_latent.{tensor}",
        "semantic_decoder.in_proj.{tensor}": "semantic_decoder.from_latent.{tensor}",
        "semantic_decoder.norm.{tensor}": "semantic_decoder.norm_out.{tensor}",
        "sem_to_pix.{tensor}": "pixel_decoder.expand.{tensor}",
        "pixel_decoder.norm.{tensor}": "pixel_decoder.norm_out.{tensor}",
        "pixel_decoder.head.{tensor}": "pixel_decoder.to_pixels.{tensor}",
        **_blocks(),
    },
    Rule(
        "low_level_encoder.patch_embed.proj.weight",
        "encoder.patch_in.weight",
        patch_matrix,
        patch_convolution,
    ),
    # A frozen teacher of their training, and the language model around the tokenizer.
    drop=("target_backbone.*", "model.*", "linear_proj.*"),
)


def size_of(state: Mapping[str, Tensor], part: str, heads: int | None) -> ViTSize:
    """Of one of the three transformers."""
    width = len(state[f"{part}.blocks.0.0.norm1.weight"])
    depth = count(state, part + r"\.blocks\.0\.(\d+)\.")
    return ViTSize(width, depth, heads_of(width, heads))


def from_official(
    state: Mapping[str, Tensor],
    image_size: int | None = None,
    norm: tuple[float, float] = PUBLISHED,
    heads: tuple[int, int] | None = None,
    where: str = "",
) -> MingTok:
    """A tokenizer with the sizes that the weights show, filled with them; `norm` is the mean and the
    deviation of latents, `heads` are the encoder's and the decoders'.
    """
    OFFICIAL[0].check(state)
    patch_size = state["low_level_encoder.patch_embed.proj.weight"].shape[-1]
    side = isqrt(state["low_level_encoder.pos_embed"].shape[1] - 1)
    finer = isqrt(len(state["pixel_decoder.head.bias"]) // 3)
    if finer * FINER != patch_size:
        raise UserError(f"pixels come in patches of {finer}; {patch_size // FINER} are supported")
    encoder_heads, decoder_heads = heads or (None, None)
    made = MingTok(
        LatentNorm(len(state["low_level_encoder.out_proj.bias"]), *norm),
        image_size or side * patch_size,
        patch_size,
        encoder_size=size_of(state, "low_level_encoder", encoder_heads),
        semantic_size=size_of(state, "semantic_decoder", decoder_heads),
        pixel_size=size_of(state, "pixel_decoder", decoder_heads),
        trained_size=side * patch_size,
    )
    return OFFICIAL[0].fill(made, state, where)


def to_official(tokenizer: MingTok) -> dict[str, Tensor]:
    """Official state dict of a tokenizer, as MingTok-Vision has it; the inverse of `from_official`."""
    return OFFICIAL[0].to_official(tokenizer)


def inside(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer of a file that holds the language model too."""
    return {
        name.removeprefix(INSIDE): tensor
        for name, tensor in state.items()
        if name.startswith(INSIDE)
    }


def around(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `inside`, without the language model."""
    return {f"{INSIDE}{name}": tensor for name, tensor in state.items()}


def norm_beside(file: str | None) -> tuple[float, float]:
    """Mean and deviation of latents in the config.json beside a file, else the published ones.

    Raises UserError for a config whose numbers are none.
    """
    beside = None if file is None else Path(file).with_name("config.json")
    if beside is None or not beside.is_file():
        return PUBLISHED
    try:
        config = parse_json(beside.read_text(), str(beside))
        return float(config["mean"]), float(config["scaling_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{beside} has no numbers `mean` and `scaling_factor` of the latents ({error})"
        ) from error


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> MingTok:
    norm = norm_beside(options.file)
    return from_official(state, options.image_size, norm, options.heads)


OFFICIAL = (
    TokenizerImporter(
        what="a MingTok tokenizer",
        marks=(
            "low_level_encoder.out_proj.weight",
            "semantic_decoder.in_proj.weight",
            "sem_to_pix.weight",
        ),
        entries=FLAT,
        keys=KEYS,
        own=("quantizer.*", "hidden_latent", "semantic_head.*", "detail_head.*"),
        build=_build,
    ),
    TokenizerImporter(
        what="a MingTok tokenizer inside of Ming-UniVision",
        marks=("vision.low_level_encoder.out_proj.weight", "vision.sem_to_pix.weight"),
        entries=FLAT,
        keys=KEYS,
        own=("quantizer.*", "hidden_latent", "semantic_head.*", "detail_head.*"),
        split=inside,
        join=around,
        build=lambda state, options: _build(inside(state), options),
    ),
)
