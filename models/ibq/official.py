"""IBQ's generator checkpoints (arXiv 2412.02692, `AR_256_{B,L,XL,XXL}.ckpt`), official keys to ours
and back.

Sizes are read from the tensors' shapes; heads have 64 channels as published unless `num_heads` says
otherwise. The tokenizer lies in the same file (tokenizers/ibq).
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.lightning import generator_weights
from tessellar.interop.sizes import count, ffn_multiple, heads_of
from tessellar.models.ibq.model import IBQAR
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "tok_emb.weight": "token_embedding.weight",
        "class_emb.embedding_table.weight": "conditioning.embedding.weight",
        "blocks.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "blocks.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "blocks.{i}.ada_lin.1.{tensor}": "layers.{i}.modulation.linear.{tensor}",
        "blocks.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "head_nm.rmsnorm.weight": "norm.weight",
        "head_nm.ada_lin.1.{tensor}": "last_modulation.linear.{tensor}",
        "head.weight": "output.weight",
    },
    drop=("*.kv_cache.*",),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the IBQ checkpoint",
) -> IBQAR:
    """Our generator with the weights of an official state dict, over the tokens of `layout`.

    Raises UserError for unknown or missing keys, and for a layout of another vocabulary.
    """
    OFFICIAL.check(state)
    weights = generator_weights(state)
    vocab, width = weights["tok_emb.weight"].shape
    hidden = len(weights["blocks.0.feed_forward.w1.weight"])
    generator = IBQAR(
        layout,
        width,
        depth=count(weights, r"blocks\.(\d+)\."),
        num_heads=heads_of(width, num_heads),
        num_classes=len(weights["class_emb.embedding_table.weight"]) - 1,
        ffn_multiple_of=ffn_multiple(width, hidden),
    )
    if generator.token_embedding.num_embeddings != vocab:
        raise UserError(
            f"{where} predicts {vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: IBQAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


OFFICIAL = GeneratorImporter(
    what="an IBQ generator",
    marks=("*tok_emb.weight", "*head_nm.rmsnorm.weight"),
    entries=("state_dict",),
    keys=KEYS,
    split=generator_weights,
    build=by_heads(from_official),
)
