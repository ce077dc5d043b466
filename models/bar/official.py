"""BAR's generator checkpoints (arXiv 2602.09024, `bar_{b,b_patch2,b_patch4,l,l_res512}.bin`), official
keys to ours and back. (The tokenizer: tokenizers/bar_fsq.)

Keys are those of the modules in the official code; no file was read. All sizes are read from the
tensors' shapes, heads from the norms of queries, and the patch from the tokenizer's bits.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.bar.model import BAR, FIRST_CLASS
from tessellar.protocol.layout import Bits, Layout

PACKED = ".mlp.w12."  # the half under the activation above the other
_HEAD = "lm_head"
KEYS = table(
    {
        "cls_token": "start_token",
        "pos_embed": "position",
        "target_aware_pos_embed": "target_position",
        "timesteps_embeddings": "step_embedding",
        "embeddings.weight": "labels.weight",
        "input_embeddings.weight": "embedding.table.weight",
        "input_merge.{tensor}": "embedding.project.{tensor}",
        "blocks.{i}.norm1.weight": "layers.{i}.norm1.weight",
        "blocks.{i}.norm2.weight": "layers.{i}.norm2.weight",
        "blocks.{i}.attn.{layer}.{tensor}": "layers.{i}.attention.{layer}.{tensor}",
        "blocks.{i}.mlp.gate.{tensor}": "layers.{i}.mlp.w1.{tensor}",
        "blocks.{i}.mlp.value.{tensor}": "layers.{i}.mlp.w3.{tensor}",
        "blocks.{i}.mlp.w3.{tensor}": "layers.{i}.mlp.w2.{tensor}",
        "blocks.{i}.adaLN_modulation.1.{tensor}": "layers.{i}.modulation.linear.{tensor}",
        "norm.weight": "norm.weight",
        "latent_condition_proj.{tensor}": "bit_head.condition.{tensor}",
        f"{_HEAD}.input_embed.weight": "bit_head.embedding.table.weight",
        f"{_HEAD}.input_proj.{{tensor}}": "bit_head.embedding.project.{tensor}",
        f"{_HEAD}.ln_pre.weight": "bit_head.norm_in.weight",
        f"{_HEAD}.t_embedder.W": "bit_head.frequencies",
        f"{_HEAD}.t_embedder.mlp.0.{{tensor}}": "bit_head.ratio_in.{tensor}",
        f"{_HEAD}.t_embedder.mlp.2.{{tensor}}": "bit_head.ratio_out.{tensor}",
        f"{_HEAD}.transformer.{{i}}.in_ln.weight": "bit_head.blocks.{i}.norm.weight",
        f"{_HEAD}.transformer.{{i}}.mlp.gate.{{tensor}}": "bit_head.blocks.{i}.mlp.w1.{tensor}",
        f"{_HEAD}.transformer.{{i}}.mlp.value.{{tensor}}": "bit_head.blocks.{i}.mlp.w3.{tensor}",
        f"{_HEAD}.transformer.{{i}}.mlp.w3.{{tensor}}": "bit_head.blocks.{i}.mlp.w2.{tensor}",
        f"{_HEAD}.transformer.{{i}}.adaLN_modulation.1.{{tensor}}": (
            "bit_head.blocks.{i}.modulation.linear.{tensor}"
        ),
        f"{_HEAD}.adaln_before_head.norm_final.weight": "bit_head.norm.weight",
        f"{_HEAD}.adaln_before_head.adaLN_modulation.1.{{tensor}}": (
            "bit_head.last_modulation.linear.{tensor}"
        ),
        f"{_HEAD}.output_embed.{{tensor}}": "bit_head.output.{tensor}",
    },
    drop=("blocks.{i}.attn.rope.*",),  # tables of rotations, which ours computes
)


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each packed gated layer as two."""
    found = {}
    for name, tensor in state.items():
        if PACKED in name:
            gate, value = tensor.chunk(2)
            found[name.replace("w12", "gate")] = gate
            found[name.replace("w12", "value")] = value
        else:
            found[name] = tensor
    return found


def join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`."""
    found = {}
    for name, tensor in state.items():
        if ".mlp.gate." in name:
            other = state[name.replace("gate", "value")]
            found[name.replace("gate", "w12")] = torch.cat([tensor, other])
        elif ".mlp.value." not in name:
            found[name] = tensor
    return found


def from_official(
    state: Mapping[str, Tensor], layout: Layout, where: str = "the BAR checkpoint"
) -> BAR:
    """Our generator with the weights of an official state dict, over the tokens of `layout`.

    Raises UserError for unknown or missing keys, and for a layout of other bits.
    """
    OFFICIAL.check(state)
    weights = split(state)
    width = weights["cls_token"].shape[-1]
    bits = len(weights[f"{_HEAD}.output_embed.bias"]) // 2
    kind = layout.segments[0].kind
    patch = isqrt(bits // kind.n) if isinstance(kind, Bits) else 0
    if not isinstance(kind, Bits) or kind.n * patch**2 != bits:
        raise UserError(
            f"{where} predicts {bits} bits a position, but the tokenizer gives {layout}: give its own tokenizer"
        )
    generator = BAR(
        layout,
        width,
        depth=count(weights, r"blocks\.(\d+)\."),
        num_heads=width // len(weights["blocks.0.attn.q_norm.weight"]),
        patch=patch,
        head_width=len(weights[f"{_HEAD}.input_proj.bias"]),
        head_depth=count(weights, rf"{_HEAD}\.transformer\.(\d+)\."),
        num_classes=len(weights["embeddings.weight"]) - FIRST_CLASS - 1,
        dropout=0.0,
    )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: BAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> BAR:
    return from_official(state, layout)


OFFICIAL = GeneratorImporter(
    what="a BAR generator",
    marks=("*target_aware_pos_embed", "*lm_head.output_embed.weight"),
    entries=FLAT,
    keys=KEYS,
    split=split,
    join=join,
    build=_build,
    tokenizer="bar_fsq",
)
