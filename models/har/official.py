"""HAR's checkpoints (arXiv 2601.03955), official keys to ours and back, and the recorded outputs of the generator."""

from collections.abc import Mapping

from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, table
from tessellar.interop.sizes import count
from tessellar.models.har.model import HAR
from tessellar.models.llamagen.official import HEADS
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer

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


def is_generator(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of HAR rather than of ResTok."""
    return "spe_tok_embeddings.special_embeddings.weight" in state


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    first: int = 4,
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    where: str = "the HAR checkpoint",
) -> HAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the tokenizer's layout."""
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
        ffn_multiple_of=256 if -(-int(8 * width / 3) // 256) * 256 == hidden else hidden,
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    if (generator.token_embedding.num_embeddings, generator.special_embedding.num_embeddings) != (vocab, special):
        raise UserError(f"{where} is for {special + 1} tokens of {vocab} codes, but the tokenizer gives {layout}")
    load_strict(generator, KEYS.from_official(state, where), where)
    return generator.eval()


def to_official(generator: HAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return KEYS.to_official(generator.state_dict())


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> Generator:
    """What `convert.py import restok` makes of a generator's file."""
    generator = from_official(state, tokenizer.layout, options.num_heads)
    return generator
