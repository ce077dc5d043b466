"""The checkpoints of ReToK's GPT (arXiv 2601.01535), official keys to ours and back. (The
tokenizer: tokenizers/retok.)

Sizes are read from the tensors' shapes; the number of heads is known for the published widths, else
`num_heads` is needed.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.retok import ReToKGPT
from tessellar.protocol.layout import Layout

GPT_KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "tok_embeddings.weight": "token_embedding.weight",
        "positional_embedding": "position_embedding",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    drop=("*.kv_cache.*",),
)


# width -> heads of the published generators: B, L, XL, XXL
GPT_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24}


def gpt_from_official(
    state: Mapping[str, Tensor],
    tokenizer_layout: Layout,
    num_heads: int | None = None,
    multiple_of: int = 256,
    norm_eps: float = 1e-5,
) -> ReToKGPT:
    """The generator of an official state dict over the tokens of a layout; raises UserError where
    they do not fit.
    """
    OFFICIAL.check(state)
    width = state["tok_embeddings.weight"].shape[1]
    heads = num_heads or GPT_HEADS.get(width)
    if heads is None:
        raise UserError(f"no published ReToK generator has width {width}: give --num_heads")
    generator = ReToKGPT(
        tokenizer_layout,
        width,
        count(state, r"layers\.(\d+)\."),
        heads,
        len(state["cls_embedding.embedding_table.weight"]) - 1,
        ffn_multiple_of=ffn_multiple(
            width, len(state["layers.0.feed_forward.w1.weight"]), multiple_of
        ),
        norm_eps=norm_eps,
    )
    return OFFICIAL.fill(generator, state)


def gpt_to_official(generator: ReToKGPT) -> dict[str, Tensor]:
    """The official state dict; the inverse of `gpt_from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> ReToKGPT:
    return gpt_from_official(state, layout, options.num_heads)


OFFICIAL = GeneratorImporter(
    what="a ReToK generator",
    marks=("tok_embeddings.weight", "positional_embedding"),
    entries=("model", "module", "state_dict"),  # the official sampling script loads the raw weights
    keys=GPT_KEYS,
    build=_build,
)
