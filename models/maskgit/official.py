"""The MaskGIT generators of TiTok and One-D-Piece (arXiv 2406.07550, 2501.10064), official keys to
ours and back.

Sizes are read from the tensors' shapes; heads are 16 in every published one and otherwise an
argument.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, ImportOptions
from tessellar.interop.keys import KeyTable, table
from tessellar.interop.sizes import count
from tessellar.models.maskgit.model import MaskGIT, UViT
from tessellar.protocol.layout import Layout

_LAYER = "model.encoder.layer.{i}"
VIT_KEYS = table(
    {
        "model.embeddings.word_embeddings.weight": "backbone.embedding.weight",
        "model.embeddings.position_embeddings.weight": "backbone.position.weight",
        "model.embeddings.token_type_embeddings.weight": "backbone.token_type.weight",
        "model.embeddings.LayerNorm.{tensor}": "backbone.norm.{tensor}",
        f"{_LAYER}.attention.self.query.{{tensor}}": "backbone.layers.{i}.query.{tensor}",
        f"{_LAYER}.attention.self.key.{{tensor}}": "backbone.layers.{i}.key.{tensor}",
        f"{_LAYER}.attention.self.value.{{tensor}}": "backbone.layers.{i}.value.{tensor}",
        f"{_LAYER}.attention.output.dense.{{tensor}}": "backbone.layers.{i}.proj.{tensor}",
        f"{_LAYER}.attention.output.LayerNorm.{{tensor}}": "backbone.layers.{i}.attention_norm.{tensor}",
        f"{_LAYER}.intermediate.dense.{{tensor}}": "backbone.layers.{i}.fc1.{tensor}",
        f"{_LAYER}.output.dense.{{tensor}}": "backbone.layers.{i}.fc2.{tensor}",
        f"{_LAYER}.output.LayerNorm.{{tensor}}": "backbone.layers.{i}.mlp_norm.{tensor}",
        "model.lm_head.{tensor}": "output.{tensor}",
    },
    drop=("model.embeddings.position_ids",),
)
_BLOCKS = {  # spelled out, so that the way back is one too: ours has attention, MLP and norms side by side
    "{where}.attn.qkv.{tensor}": "backbone.{where}.qkv.{tensor}",
    "{where}.attn.proj.{tensor}": "backbone.{where}.proj.{tensor}",
    "{where}.mlp.fc1.{tensor}": "backbone.{where}.fc1.{tensor}",
    "{where}.mlp.fc2.{tensor}": "backbone.{where}.fc2.{tensor}",
    "{where}.skip_linear.{tensor}": "backbone.{where}.skip.{tensor}",
    "{where}.norm1.{tensor}": "backbone.{where}.norm1.{tensor}",
    "{where}.norm2.{tensor}": "backbone.{where}.norm2.{tensor}",
}
UVIT_KEYS = table(
    {
        "embeddings.weight": "backbone.embedding.weight",
        "pos_embed": "backbone.position",
        "norm.{tensor}": "backbone.norm.{tensor}",
        "lm_head.{tensor}": "output.{tensor}",
        **{
            theirs.replace("{where}", where): ours.replace("{where}", where)
            for where in ("in_blocks.{i}", "mid_block", "out_blocks.{i}")
            for theirs, ours in _BLOCKS.items()
        },
    },
)
PUBLISHED_HEADS = 16


def _keys(is_uvit: bool) -> KeyTable:
    return UVIT_KEYS if is_uvit else VIT_KEYS


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int = PUBLISHED_HEADS,
    where: str = "the MaskGIT checkpoint",
) -> MaskGIT:
    """A generator of the sizes that the weights show; raises UserError where layout and weights
    disagree.
    """
    is_uvit = "pos_embed" in state
    ours = _keys(is_uvit).from_official(state, where)
    table_name = "backbone.position" if is_uvit else "backbone.position.weight"
    if table_name not in ours or "output.weight" not in ours:
        raise UserError(
            f"{where} holds no MaskGIT generator: position table or output layer is absent"
        )
    (vocab, width), length = ours["output.weight"].shape, ours[table_name].shape[-2] - 1
    if length != layout.length:
        raise UserError(f"{where} is for {length} tokens, but the tokenizer gives {layout}")
    pattern = r"backbone\.in_blocks\.(\d+)\." if is_uvit else r"backbone\.layers\.(\d+)\."
    depth = count(ours, pattern)
    first = "in_blocks" if is_uvit else "layers"
    generator = MaskGIT(
        layout,
        "uvit" if is_uvit else "vit",
        width=width,
        depth=2 * depth if is_uvit else depth,
        num_heads=num_heads,
        hidden=ours[f"backbone.{first}.0.fc1.weight"].shape[0],
        num_classes=ours["backbone.embedding.weight"].shape[0] - vocab - 2,
    )
    if generator.vocab != vocab:
        raise UserError(
            f"{where} predicts {vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: MaskGIT) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _keys_of(generator: MaskGIT) -> KeyTable:
    return _keys(isinstance(generator.backbone, UViT))


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> MaskGIT:
    return from_official(state, layout, options.num_heads or PUBLISHED_HEADS)


OFFICIAL = GeneratorImporter(
    what="a MaskGIT generator",
    marks=("*lm_head.weight",),  # of both backbones
    entries=FLAT,
    keys=_keys_of,
    build=_build,
)
