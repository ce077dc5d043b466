"""Hita's tokenizer checkpoints (arXiv 2507.02358), official keys to ours and back. (The generator:
models/hita.)

Checkpoints leave out the frozen vision model: an imported tokenizer decodes, and encodes once it is
given one.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import table
from tessellar.interop.sizes import cnn_sizes, count
from tessellar.tokenizers.hita.tokenizer import Hita
from tessellar.tokenizers.hita.vision import HitaVision
from tessellar.tokenizers.llamagen.official import cnn_keys, decoder_multipliers
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

BACKBONE = "encode_transformer.backbone."
_ENCODER = "encode_transformer"
_DECODER = "decode_transformer"
_GLU = {"ffnet.w12.{tensor}": "mlp.fc1.{tensor}", "ffnet.w3.{tensor}": "mlp.fc2.{tensor}"}
_FULL = {f"attn1.to_{x}.{{tensor}}": f"attention.{x}.{{tensor}}" for x in "qkv"} | {
    "attn1.to_out.0.{tensor}": "attention.out.{tensor}",
    **_GLU,
    "{norm}.{tensor}": "{norm}.{tensor}",
}
_CAUSAL = {
    f"attn1.{x}_proj.{{tensor}}": f"attention.{x}.{{tensor}}" for x in ("q", "k", "v", "out")
} | {
    **_GLU,
    "{norm}.{tensor}": "{norm}.{tensor}",
}


def _blocks(theirs: str, ours: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.layers.{{i}}.{a}": f"{ours}.{{i}}.{b}" for a, b in parts.items()}


KEYS = table(
    {
        **cnn_keys("encoder", "cnn_encoder"),
        **cnn_keys("decoder", "cnn_decoder"),
        f"{_ENCODER}.carrier_tokens": "encoder.queries",
        f"{_ENCODER}.pos_embed": "encoder.positions",
        f"{_ENCODER}.proj.mlp.{{i}}.{{tensor}}": "encoder.project.{i}.{tensor}",
        f"{_ENCODER}.norm_pre1.{{tensor}}": "encoder.norm_mixing.{tensor}",
        f"{_ENCODER}.norm_pre2.{{tensor}}": "encoder.norm_ordering.{tensor}",
        **_blocks(f"{_ENCODER}.transformer1", "encoder.mixing", _FULL),
        **_blocks(f"{_ENCODER}.transformer2", "encoder.ordering", _CAUSAL),
        f"{_DECODER}.position_embedding": "decoder.positions",
        f"{_DECODER}.slot_position_embedding": "decoder.holistic_positions",
        f"{_DECODER}.mask_embedding": "decoder.mask_token",
        f"{_DECODER}.norm.{{tensor}}": "decoder.norm.{tensor}",
        f"{_DECODER}.norm_vfm.{{tensor}}": "decoder.norm_vision.{tensor}",
        f"{_DECODER}.proj.{{tensor}}": "decoder.to_vision.{tensor}",
        **_blocks(f"{_DECODER}.transformer", "decoder.blocks", _CAUSAL),
        "quant_conv.{tensor}": "to_code.{tensor}",
        "post_quant_conv.{tensor}": "from_code.{tensor}",
        "pre_slots_quant.{tensor}": "to_holistic_code.{tensor}",
        "post_slots_quant.{tensor}": "from_holistic_code.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "slot_quantize.embedding.weight": "holistic_quantizer.codebook.weight",
    },
    drop=("quantize.codebook_used", "slot_quantize.codebook_used", f"{BACKBONE}*"),
)


def from_official(
    state: Mapping[str, Tensor],
    image_size: int = 336,
    num_heads: int = 8,
    shift: int = 4,
    vision: HitaVision | None = None,
    dropout: float = 0.1,
    quantizer_options: Mapping[str, Any] | None = None,
    where: str = "the Hita checkpoint",
) -> Hita:
    """A tokenizer of the sizes that the weights show; heads and the shift of the read-out are not
    among them.
    """
    OFFICIAL.check(state)
    ours = KEYS.from_official(state, where)
    cnn = cnn_sizes(ours, "cnn_encoder.levels.{i}.res.{j}", len(ours["cnn_encoder.conv_in.weight"]))
    options = dict(quantizer_options or {})
    holistic_size, holistic_dim = ours["holistic_quantizer.codebook.weight"].shape
    patch_size, patch_dim = ours["quantizer.codebook.weight"].shape
    hidden = ours["encoder.mixing.0.mlp.fc2.weight"].shape[1]
    made = Hita(
        VectorQuantizer(holistic_size, holistic_dim, **options),
        VectorQuantizer(patch_size, patch_dim, **options),
        vision=vision,
        image_size=image_size,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
        width=ours["encoder.queries"].shape[2],
        depth=count(ours, r"encoder\.mixing\.(\d+)\."),
        num_heads=num_heads,
        mlp_dim=-(-3 * hidden // 2),  # one that gives this hidden size; several do
        holistic=ours["encoder.queries"].shape[1],
        shift=shift,
        dropout=dropout,
        vision_dim=ours["encoder.project.0.weight"].shape[1],
        vision_loss=1.0 if "decoder.mask_token" in ours else 0.0,
        decoder_multipliers=decoder_multipliers(ours, "cnn_decoder.levels.{i}.res.{j}", cnn),
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: Hita) -> dict[str, Tensor]:
    """The official state dict (without the vision model and their queue of codes)."""
    return OFFICIAL.to_official(tokenizer)


def vision_from_official(
    state: Mapping[str, Tensor], **options: int | float | bool | str
) -> HitaVision:
    """The vision model of keys `encode_transformer.backbone.pretrained_encoder.*`, converted by
    timm.
    """
    made = HitaVision("vit_large_patch14_reg4_dinov2", image_size=224, options=options)
    prefix = f"{BACKBONE}pretrained_encoder."
    made.fill(part_of(state, prefix), "the backbone")
    return made


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> Hita:
    return from_official(state, options.image_size or 336, options.num_heads or 8)


OFFICIAL = TokenizerImporter(
    what="a Hita tokenizer",
    marks=(f"{_ENCODER}.carrier_tokens", "encoder.conv_in.weight"),
    entries=("ema", "model"),  # the official scripts load the average
    keys=KEYS,
    # The frozen vision model is published on its own.
    own=(
        "quantizer.step",
        "quantizer.counts",
        "holistic_quantizer.step",
        "holistic_quantizer.counts",
        "vision.*",
    ),
    build=_build,
)
