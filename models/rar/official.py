"""RAR's checkpoints (arXiv 2411.00776, `rar_{b,l,xl,xxl}.bin`), official keys to ours and back.

All sizes are read from the tensors' shapes.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.rar.model import RAR, SPARE_POSITIONS
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "cls_token": "start_token",
        "embeddings.weight": "embedding.weight",
        "pos_embed": "position",
        "target_aware_pos_embed": "target_position",
        "timesteps_embeddings": "step_embedding",
        "blocks.{i}.attn.{layer}.{tensor}": "layers.{i}.attention.{layer}.{tensor}",
        # Spelled out, so that the way back is one too: ours has norms and the MLP side by side.
        "blocks.{i}.mlp.fc1.{tensor}": "layers.{i}.fc1.{tensor}",
        "blocks.{i}.mlp.fc2.{tensor}": "layers.{i}.fc2.{tensor}",
        "blocks.{i}.adaLN_modulation.1.{tensor}": "layers.{i}.modulation.linear.{tensor}",
        "blocks.{i}.norm1.{tensor}": "layers.{i}.norm1.{tensor}",
        "blocks.{i}.norm2.{tensor}": "layers.{i}.norm2.{tensor}",
        "adaln_before_head.adaLN_modulation.1.{tensor}": "last_modulation.linear.{tensor}",
        "lm_head.{tensor}": "output.{tensor}",
    },
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    where: str = "the RAR checkpoint",
) -> RAR:
    """A generator of the sizes that the weights show; raises UserError where the layout has another
    length.
    """
    OFFICIAL.check(state)
    rows, width = state["embeddings.weight"].shape
    vocab = state["lm_head.weight"].shape[0]
    length = state["pos_embed"].shape[1] - SPARE_POSITIONS
    if length != layout.length:
        raise UserError(f"{where} is for {length} tokens, but the tokenizer gives {layout}")
    depth = count(state, r"blocks\.(\d+)\.")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    heads = width // state["blocks.0.attn.q_norm.weight"].shape[0]
    generator = RAR(layout, width, depth, heads, hidden, rows - vocab - 2)
    if generator.vocab != vocab:
        raise UserError(
            f"{where} predicts {vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: RAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> RAR:
    return from_official(state, layout)  # the heads show in the weights


OFFICIAL = GeneratorImporter(
    what="a RAR generator",
    marks=("timesteps_embeddings", "target_aware_pos_embed"),
    entries=FLAT,
    keys=KEYS,
    build=_build,
)
