"""ReToK's checkpoints (arXiv 2601.01535): tokenizer and GPT, official keys to ours and back.

Sizes are read from the tensors' shapes; the number of heads is known for the published widths, else `num_heads` is
needed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, table
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.retok import ReToKGPT
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import Tokenizer

GENERATOR_ENTRIES = ("model", "module", "state_dict")


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
    tokenizer_layout: Any,
    num_heads: int | None = None,
    multiple_of: int = 256,
    norm_eps: float = 1e-5,
) -> ReToKGPT:
    """The generator of an official state dict over the tokens of a layout; raises UserError where they do not fit."""
    if "positional_embedding" not in state or "tok_embeddings.weight" not in state:
        raise UserError("this is not a ReToK generator: positional_embedding or tok_embeddings.weight is absent")
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
        ffn_multiple_of=ffn_multiple(width, len(state["layers.0.feed_forward.w1.weight"]), multiple_of),
        norm_eps=norm_eps,
    )
    load_strict(generator, GPT_KEYS.from_official(state, "the ReToK generator"), "the ReToK generator")
    return generator.eval()


def gpt_to_official(generator: ReToKGPT) -> dict[str, Tensor]:
    """The official state dict; the inverse of `gpt_from_official`."""
    return GPT_KEYS.to_official(generator.state_dict())


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> Generator:
    """What `convert.py import retok` makes of a generator's file."""
    generator = gpt_from_official(state, tokenizer.layout, options.num_heads)
    return generator
