"""LlamaGen's class- and text-conditional GPT checkpoints (arXiv 2406.06525), official keys to ours
and back.

Sizes are read from the tensors' shapes; what shapes do not tell (number of heads, RoPE base, norm
epsilon) is known for the published variants and otherwise an argument. The grid is the tokenizer's:
the weights do not depend on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.options import check_options
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.llamagen.model import LlamaGen
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "cls_embedding.cap_proj.{layer}.weight": "conditioning.{layer}.weight",
        "cls_embedding.uncond_embedding": "conditioning.uncond",
        "tok_embeddings.weight": "token_embedding.weight",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    drop=("freqs_cis", "*.kv_cache.*"),
)

# (width, depth) -> heads of every variant that the official code defines: B, L, XL, XXL, XXXL, 1B,
# 3B, 7B
HEADS = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (2560, 48): 40,
    (2048, 22): 32,
    (3200, 24): 32,
    (4096, 32): 32,
}


# options of the official `ModelArgs` that are read, or that the shapes tell, or that only training
# needs
READ = (
    "dim n_layer n_head n_kv_head multiple_of ffn_dim_multiplier norm_eps rope_base vocab_size block_size num_classes "
    "caption_dim model_type class_dropout_prob dropouts drop_path_rate max_batch_size max_seq_len"
).split()
RATES = ("token_dropout_p", "resid_dropout_p", "ffn_dropout_p")  # one rate here


@dataclass(frozen=True)
class Sizes:
    """What the shapes of an official GPT state dict tell."""

    width: int
    depth: int
    vocab: int
    hidden: int
    num_classes: int | None
    caption_dim: int | None
    caption_length: int


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """Sizes of an official state dict; raises UserError where it lacks the tensors that tell them."""
    OFFICIAL.check(state)
    classes = state.get("cls_embedding.embedding_table.weight")
    captions = state.get("cls_embedding.uncond_embedding")
    if (classes is None) == (captions is None):
        raise UserError(
            "a LlamaGen generator has either cls_embedding.embedding_table.weight or cls_embedding.uncond_embedding"
        )
    vocab, width = state["tok_embeddings.weight"].shape
    return Sizes(
        width=width,
        depth=count(state, r"layers\.(\d+)\."),
        vocab=vocab,
        hidden=state["layers.0.feed_forward.w1.weight"].shape[0],
        num_classes=None if classes is None else len(classes) - 1,
        caption_dim=None if captions is None else captions.shape[1],
        caption_length=120 if captions is None else captions.shape[0],
    )


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    multiple_of: int = 256,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    drop_path: float = 0.0,
) -> LlamaGen:
    """Our generator with the weights of an official state dict, over the tokens of `layout`.

    Raises UserError for unknown or missing keys, for a layout of another vocabulary, and where the
    number of heads is neither given nor known.
    """
    sizes = sizes_of(state)
    generator = LlamaGen(
        layout,
        sizes.width,
        depth=sizes.depth,
        num_heads=num_heads or heads_shown(state, sizes),
        num_classes=sizes.num_classes,
        caption_dim=sizes.caption_dim,
        caption_length=sizes.caption_length,
        condition_dropout=condition_dropout,
        dropout=dropout,
        drop_path=drop_path,
        ffn_multiple_of=ffn_multiple(sizes.width, sizes.hidden, multiple_of),
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    if generator.token_embedding.num_embeddings != sizes.vocab:
        raise UserError(
            f"this generator predicts {sizes.vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state)


def to_official(generator: LlamaGen) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def from_config(state: Mapping[str, Tensor], config: Mapping[str, Any], layout: Layout) -> LlamaGen:
    """Our generator from official weights and official option names (`ModelArgs`), every dropout as
    the config says.
    """
    heads = config["n_head"]
    if config.get("n_kv_head") not in (None, heads):
        raise UserError(
            f"n_kv_head {config['n_kv_head']} is not supported: no published model groups its queries"
        )
    captions = state.get("cls_embedding.uncond_embedding")
    length = 1 if captions is None else len(captions)
    dropout = config.get("dropouts", config.get(RATES[0], 0.1))
    supported = {"cls_token_num": length, "attn_dropout_p": 0.0, "initializer_range": 0.02}
    check_options(config, "the config", READ, supported | dict.fromkeys(RATES, dropout))
    return from_official(
        state,
        layout,
        num_heads=heads,
        norm_eps=config.get("norm_eps", 1e-5),
        rope_base=config.get("rope_base", 10000),
        multiple_of=config.get("multiple_of", 256),
        condition_dropout=config.get("class_dropout_prob", 0.1),
        dropout=dropout,
        drop_path=config.get("drop_path_rate", 0.0),
    )


def heads_shown(state: Mapping[str, Tensor], sizes: Sizes) -> int:
    """From the saved rotation table, or the published variant of that width and depth."""
    if "freqs_cis" in state:
        return sizes.width // (2 * state["freqs_cis"].shape[1])
    if (sizes.width, sizes.depth) not in HEADS:
        raise UserError(
            f"no published LlamaGen has width {sizes.width} and depth {sizes.depth}: give --num_heads"
        )
    return HEADS[sizes.width, sizes.depth]


OFFICIAL = GeneratorImporter(
    what="a LlamaGen generator",
    marks=("tok_embeddings.weight", "cls_embedding.*", "layers.0.feed_forward.w1.weight"),
    # The order of the official sampling script; no average.
    entries=("model", "module", "state_dict"),
    keys=KEYS,
    build=by_heads(from_official),
)
