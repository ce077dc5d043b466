"""Open-MAGVIT2's generator checkpoints (arXiv 2409.04410, `AR_256_{B,L,XL}.ckpt`), official keys to
ours and back.

Sizes are read from the tensors' shapes; heads have 64 channels as published unless `num_heads` says
otherwise. The grid is the tokenizer's, which lies in the same file (tokenizers/open_magvit2).
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.lightning import generator_weights
from tessellar.interop.sizes import count, ffn_multiple, heads_of
from tessellar.models.open_magvit2.model import OpenMAGVIT2AR
from tessellar.protocol.layout import Layout


def _blocks(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.{{i}}.{part}": f"{ours}.{{i}}.{part}"
        for part in (
            "attention.{tensor}.weight",
            "feed_forward.{tensor}.weight",
            "{norm}.weight",
        )
    }


KEYS = table(
    {
        "pre_emb.weight": "embeddings.0.weight",
        "post_emb.weight": "embeddings.1.weight",
        "class_emb.embedding_table.weight": "conditioning.embedding.weight",
        **_blocks("spatial_blocks", "layers"),
        **_blocks("factorized_blocks", "intra.layers"),
        "norm.weight": "intra.norm.weight",
        "head.{i}.weight": "intra.outputs.{i}.weight",
    },
    drop=("*.kv_cache.*",),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the Open-MAGVIT2 checkpoint",
) -> OpenMAGVIT2AR:
    """Our generator with the weights of an official state dict, over the tokens of `layout`.

    Raises UserError for unknown or missing keys, and for a layout of other sub-tokens.
    """
    OFFICIAL.check(state)
    weights = generator_weights(state)
    vocabs = (len(weights["pre_emb.weight"]), len(weights["post_emb.weight"]))
    width = weights["pre_emb.weight"].shape[1]
    hidden = len(weights["spatial_blocks.0.feed_forward.w1.weight"])
    generator = OpenMAGVIT2AR(
        layout,
        width,
        depth=count(weights, r"spatial_blocks\.(\d+)\."),
        num_heads=heads_of(width, num_heads),
        intra_depth=count(weights, r"factorized_blocks\.(\d+)\."),
        num_classes=len(weights["class_emb.embedding_table.weight"]) - 1,
        ffn_multiple_of=ffn_multiple(width, hidden),
    )
    if generator.vocabs != vocabs:
        raise UserError(
            f"{where} predicts sub-tokens of {vocabs} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: OpenMAGVIT2AR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


OFFICIAL = GeneratorImporter(
    what="an Open-MAGVIT2 generator",
    marks=("*pre_emb.weight", "*post_emb.weight", "*factorized_blocks.0.ffn_norm.weight"),
    entries=("state_dict",),
    keys=KEYS,
    split=generator_weights,
    build=by_heads(from_official),
)
