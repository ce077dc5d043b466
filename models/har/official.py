"""HAR's checkpoints (arXiv 2601.03955), official keys to ours and back: the generator published
with ResTok.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.har.model import HAR
from tessellar.models.llamagen.official import HEADS
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "tok_embeddings.weight": "token_embedding.weight",
        "spe_tok_embeddings.special_embeddings.weight": "special_embedding.weight",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    drop=("freqs_cis", "*.kv_cache.*", "causal_mask"),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    first: int = 4,
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    where: str = "the HAR checkpoint",
) -> HAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the
    tokenizer's layout.
    """
    OFFICIAL.check(state)
    vocab, width = state["output.weight"].shape
    special = state["spe_tok_embeddings.special_embeddings.weight"].shape[0]
    depth = count(state, r"layers\.(\d+)\.")
    if num_heads is None and (width, depth) not in HEADS:
        raise UserError(f"no published HAR has width {width} and depth {depth}: give --num_heads")
    hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    generator = HAR(
        layout,
        width,
        depth,
        num_heads or HEADS[width, depth],
        state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        first,
        condition_dropout=condition_dropout,
        dropout=dropout,
        ffn_multiple_of=ffn_multiple(width, hidden),
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    if (generator.token_embedding.num_embeddings, generator.special_embedding.num_embeddings) != (
        vocab,
        special,
    ):
        raise UserError(
            f"{where} is for {special + 1} tokens of {vocab} codes, but the tokenizer gives {layout}"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: HAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


OFFICIAL = GeneratorImporter(
    what="a HAR generator",
    marks=("spe_tok_embeddings.special_embeddings.weight",),
    entries=FLAT,
    keys=KEYS,
    build=by_heads(from_official),
    paper="restok",
)
