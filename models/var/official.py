"""The checkpoints of VAR's transformer (arXiv 2404.02905), official keys to ours and back. (The
VQVAE: tokenizers/var.)

Sizes are read from the tensors' shapes.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, heads_of
from tessellar.models.var.model import VAR
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "pos_start": "start_position",
        "pos_1LC": "position",
        "lvl_embed.weight": "scale_embedding.weight",
        "class_emb.weight": "class_embedding.weight",
        "word_embed.{tensor}": "input.{tensor}",
        "blocks.{i}.ada_lin.1.{tensor}": "layers.{i}.modulation.linear.{tensor}",
        "blocks.{i}.ada_gss": "layers.{i}.modulation.offset",
        "blocks.{i}.attn.mat_qkv.weight": "layers.{i}.attention.qkv.weight",
        "blocks.{i}.attn.q_bias": "layers.{i}.attention.q_bias",
        "blocks.{i}.attn.v_bias": "layers.{i}.attention.v_bias",
        "blocks.{i}.attn.scale_mul_1H11": "layers.{i}.attention.log_scale",
        "blocks.{i}.attn.proj.{tensor}": "layers.{i}.attention.proj.{tensor}",
        "blocks.{i}.ffn.{layer}.{tensor}": "layers.{i}.mlp.{layer}.{tensor}",
        "shared_ada_lin.1.{tensor}": "shared_modulation.{tensor}",
        "head_nm.ada_lin.1.{tensor}": "last_modulation.linear.{tensor}",
        "head.{tensor}": "output.{tensor}",
    },
    drop=("lvl_1L", "attn_bias_for_masking", "blocks.{i}.attn.zero_k_bias"),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the VAR checkpoint",
    condition_dropout: float = 0.1,
    drop_path: float | None = None,
) -> VAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the
    tokenizer's layout.
    """
    OFFICIAL.check(state)
    length, width = state["pos_1LC"].shape[1:]
    if length != layout.length:
        raise UserError(f"{where} is for {length} tokens, but the tokenizer gives {layout}")
    depth = count(state, r"blocks\.(\d+)\.")
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    generator = VAR(
        layout,
        width,
        depth=depth,
        num_heads=num_heads
        or (state["blocks.0.attn.scale_mul_1H11"].shape[1] if l2_norm else heads_of(width)),
        num_classes=state["class_emb.weight"].shape[0] - 1,
        latent_dim=state["word_embed.weight"].shape[1],
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        shared_modulation="shared_ada_lin.1.weight" in state,
        l2_norm=l2_norm,
        condition_dropout=condition_dropout,
        drop_path=drop_path,
    )
    if generator.output.out_features != state["head.weight"].shape[0]:
        raise UserError(
            f"{where} predicts {state['head.weight'].shape[0]} codes, but the tokenizer gives {layout}"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: VAR) -> dict[str, Tensor]:
    """The official state dict, without the buffers; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


OFFICIAL = GeneratorImporter(
    what="a VAR generator",
    marks=("pos_1LC", "lvl_embed.weight"),
    # Of `ar-ckpt-*.pth`; the published files are flat, no weights are averaged.
    entries=("trainer.var_wo_ddp",),
    keys=KEYS,
    build=by_heads(from_official),
)
