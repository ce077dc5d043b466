"""MAR's generator checkpoints (arXiv 2406.11838), official keys to ours and back. (The VAE:
tokenizers/kl_vae.)

All sizes but the heads are read from the tensors' shapes.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.mar.model import MAR
from tessellar.protocol.layout import Continuous, Layout

HEADS = {768: 12, 1024: 16, 1280: 16}  # width -> heads of the published variants
_NET = "diffloss.net"
BACKBONE = {
    "class_emb.weight": "backbone.class_embedding.weight",
    "fake_latent": "backbone.null_embedding",
    "mask_token": "backbone.mask_token",
    "z_proj.{tensor}": "backbone.input.{tensor}",
    "z_proj_ln.{tensor}": "backbone.input_norm.{tensor}",
    "encoder_pos_embed_learned": "backbone.encoder_positions",
    "decoder_pos_embed_learned": "backbone.decoder_positions",
    "decoder_embed.{tensor}": "backbone.decoder_input.{tensor}",
    "encoder_norm.{tensor}": "backbone.encoder_norm.{tensor}",
    "decoder_norm.{tensor}": "backbone.decoder_norm.{tensor}",
    "{side}_blocks.{i}.{part}.{layer}.{tensor}": "backbone.{side}_blocks.{i}.{part}.{layer}.{tensor}",
    "{side}_blocks.{i}.{norm}.{tensor}": "backbone.{side}_blocks.{i}.{norm}.{tensor}",
}
"""Keys of the masked backbone, but for the last table, whose name is each paper's own."""
KEYS = table(
    {
        **BACKBONE,
        "diffusion_pos_embed_learned": "backbone.z_positions",
        f"{_NET}.time_embed.mlp.0.{{tensor}}": "head.time.fc1.{tensor}",
        f"{_NET}.time_embed.mlp.2.{{tensor}}": "head.time.fc2.{tensor}",
        f"{_NET}.cond_embed.{{tensor}}": "head.condition.{tensor}",
        f"{_NET}.input_proj.{{tensor}}": "head.input.{tensor}",
        f"{_NET}.res_blocks.{{i}}.in_ln.{{tensor}}": "head.blocks.{i}.norm.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.0.{{tensor}}": "head.blocks.{i}.fc1.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.2.{{tensor}}": "head.blocks.{i}.fc2.{tensor}",
        f"{_NET}.res_blocks.{{i}}.adaLN_modulation.1.{{tensor}}": "head.blocks.{i}.modulation.linear.{tensor}",
        f"{_NET}.final_layer.linear.{{tensor}}": "head.output.{tensor}",
        f"{_NET}.final_layer.adaLN_modulation.1.{{tensor}}": "head.modulation.linear.{tensor}",
    },
)


def backbone_sizes(
    ours: Mapping[str, Tensor], num_heads: int | None, decoder_heads: int | None, what: str
) -> dict[str, Any]:
    """Arguments of the masked backbone that its tensors show, in a state of ours; `what` is the
    generator's name in messages.

    The decoder has as many heads as the encoder unless `decoder_heads` says otherwise. Raises
    UserError where no published variant has the width and no heads are given.
    """
    classes, width = ours["backbone.class_embedding.weight"].shape
    length, inner = ours["backbone.z_positions"].shape[1:]
    if num_heads is None and width not in HEADS:
        raise UserError(f"no published {what} has width {width}: give --num_heads")
    return {
        "width": width,
        "depth": count(ours, r"backbone\.encoder_blocks\.(\d+)\."),
        "num_heads": num_heads or HEADS[width],
        "decoder_width": inner,
        "decoder_depth": count(ours, r"backbone\.decoder_blocks\.(\d+)\."),
        "decoder_heads": decoder_heads,
        "num_classes": classes,
        "buffer": ours["backbone.encoder_positions"].shape[1] - length,
        "mlp_ratio": ours["backbone.encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "steps": min(64, length),
    }


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the MAR checkpoint",
    decoder_heads: int | None = None,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    least_masked: float = 0.7,
) -> MAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the
    tokenizer's layout.

    The decoder has as many heads as the encoder unless `decoder_heads` says otherwise. The last
    four are of training, as MAR's own.
    """
    ours = KEYS.from_official(state, where)
    length = ours["backbone.z_positions"].shape[1]
    channels = ours["backbone.input.weight"].shape[1]
    kind = layout.segments[0].kind
    patch = isqrt(channels // kind.dim) if isinstance(kind, Continuous) else 0
    if (
        not isinstance(kind, Continuous)
        or kind.dim * patch**2 != channels
        or length * patch**2 != layout.length
    ):
        raise UserError(
            f"{where} is for {length} tokens of {channels} channels, but the tokenizer gives {layout}"
        )
    generator = MAR(
        layout,
        head_width=ours["head.input.weight"].shape[0],
        head_depth=count(ours, r"head\.blocks\.(\d+)\."),
        patch=patch,
        condition_dropout=condition_dropout,
        dropout=dropout,
        attention_dropout=attention_dropout,
        least_masked=least_masked,
        **backbone_sizes(ours, num_heads, decoder_heads, what="MAR"),
    )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: MAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> MAR:
    return from_official(state, layout, options.num_heads, decoder_heads=options.decoder_heads)


OFFICIAL = GeneratorImporter(
    what="a MAR generator",
    marks=("class_emb.weight", "fake_latent", "diffloss.net.input_proj.weight"),
    # Of `checkpoint-last.pth`: the official evaluation loads the average.
    entries=("model_ema", "model"),
    keys=KEYS,
    build=_build,
    tokenizer="kl_vae",
)
