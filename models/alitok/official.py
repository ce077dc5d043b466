"""The checkpoints of AliTok's generator (arXiv 2506.05289, `alitok_{b,l,xl}.bin`), keys to and fro.

All sizes are read from the tensors' shapes; the number of tokens is the tokenizer's: no weight
depends on it.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.alitok.model import AliTokAR
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "embeddings.weight": "embedding.weight",
        "blocks.{i}.norm1.weight": "layers.{i}.attention_norm.weight",
        "blocks.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
        "blocks.{i}.attn.qkv.{tensor}": "layers.{i}.attention.wqkv.{tensor}",
        "blocks.{i}.attn.proj.{tensor}": "layers.{i}.attention.wo.{tensor}",
        "blocks.{i}.attn.q_norm.weight": "layers.{i}.attention.q_norm.weight",
        "blocks.{i}.attn.k_norm.weight": "layers.{i}.attention.k_norm.weight",
        "blocks.{i}.mlp.{matrix}.weight": "layers.{i}.feed_forward.{matrix}.weight",
        "norm.weight": "norm.weight",
        "output.{tensor}": "output.{tensor}",
    }
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    dropout: float = 0.1,
) -> AliTokAR:
    """A generator of the sizes that the weights show, over the tokens of a layout.

    Raises UserError for other weights, and for a layout of another vocabulary.
    """
    OFFICIAL.check(state)
    rows, width = state["embeddings.weight"].shape
    vocab = len(state["output.bias"])
    generator = AliTokAR(
        layout,
        width,
        depth=count(state, r"blocks\.(\d+)\."),
        num_heads=width // len(state["blocks.0.attn.q_norm.weight"]),
        num_classes=rows - vocab - 2,
        dropout=dropout,
        ffn_multiple_of=ffn_multiple(width, len(state["blocks.0.mlp.w1.weight"])),
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    if generator.vocab != vocab:
        raise UserError(
            f"this generator predicts {vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state)


def to_official(generator: AliTokAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> AliTokAR:
    return from_official(state, layout)  # the heads show in the weights


OFFICIAL = GeneratorImporter(
    what="an AliTok generator",
    marks=("embeddings.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"),
    entries=FLAT,
    keys=KEYS,
    build=_build,
)
