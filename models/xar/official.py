"""xAR (OliverRensu/xAR): official keys to ours and back. Its tokenizer is MAR's KL-16 VAE
(tokenizers/kl_vae).

Official rows of both position tables are in the order of generation (cells); ours follow the
layout's places.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import count
from tessellar.models.xar.model import XAR
from tessellar.protocol.entities import Entities
from tessellar.protocol.layout import Layout

_BLOCK = {
    "attn.qkv.{tensor}": "attention.wqkv.{tensor}",
    "attn.proj.{tensor}": "attention.wo.{tensor}",
    "mlp.fc1_g.{tensor}": "mlp.w1.{tensor}",
    "mlp.fc1_x.{tensor}": "mlp.w3.{tensor}",
    "mlp.fc2.{tensor}": "mlp.w2.{tensor}",
    "ada_lin.1.{tensor}": "modulation.linear.{tensor}",
}
_REST = {
    "class_emb.weight": "class_embedding.weight",
    "time_embed.mlp.0.{tensor}": "time_embedding.fc1.{tensor}",
    "time_embed.mlp.2.{tensor}": "time_embedding.fc2.{tensor}",
    "z_proj.{tensor}": "encoder.project.{tensor}",
    "z_proj_ln.weight": "encoder.norm_in.weight",
    "encoder_norm.weight": "encoder.norm_out.weight",
    "decoder_embed.{tensor}": "decoder.project.{tensor}",
    "decoder_norm.weight": "decoder.norm_out.weight",
    "pred.{tensor}": "output.{tensor}",
}
CELL = "cell:8x8"  # the only X that was released


def keys(entities: Entities) -> KeyTable:
    """The table of a model with this order of generation."""
    pairs = dict(_REST)
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}_blocks.{{i}}.{a}": f"{side}.blocks.{{i}}.{b}" for a, b in _BLOCK.items()}
    order = entities.order
    inverse = entities.inverse
    tables = [
        Rule(
            f"{side}_pos_embed_learned",
            f"{side}.positions",
            lambda t: t[0, inverse],
            lambda t: t[order][None],
        )
        for side in ("encoder", "decoder")
    ]
    return table(pairs, *tables, drop=("mask", "*.attn.rope.*"))


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    entity: str = CELL,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
) -> XAR:
    """Our generator with the sizes that the weights show, filled with them.

    Raises UserError for unknown or missing keys and for a layout of other latents.
    """
    OFFICIAL.check(state)
    classes, width = state["class_emb.weight"].shape
    hidden = state["encoder_blocks.0.mlp.fc2.weight"].shape[1]
    generator = XAR(
        layout,
        entity,
        width,
        count(state, r"encoder_blocks\.(\d+)\."),
        num_heads or width // (4 * len(state["encoder_blocks.0.attn.rope.freqs"])),
        classes - 1,
        condition_dropout=condition_dropout,
        dropout=dropout,
        mlp_ratio=4.0 if hidden == int(width * 8 / 3) else 1.5 * (hidden + 0.5) / width,
        decoder_depth=count(state, r"decoder_blocks\.(\d+)\."),
    )
    return OFFICIAL.fill(generator, state)


def to_official(generator: XAR) -> dict[str, Tensor]:
    """The official state dict, without its buffers; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _keys_of(generator: XAR) -> KeyTable:
    return keys(generator.entities)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> XAR:
    return from_official(state, layout, options.num_heads, options.variant or CELL)


OFFICIAL = GeneratorImporter(
    what="an xAR generator",
    marks=("z_proj.weight", "decoder_pos_embed_learned", "time_embed.mlp.0.weight"),
    entries=("model_ema", "model"),  # of training runs; the published files are flat
    keys=_keys_of,
    build=_build,
    tokenizer="kl_vae",
)
