"""Hita's generator checkpoints (arXiv 2507.02358), official keys to ours and back, and their recorded outputs.

One official matrix holds both heads, ours are two. Imported weights sample with the official look-up by default.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, table
from tessellar.interop.sizes import count
from tessellar.models.hita.model import HitaAR, Lookup
from tessellar.models.llamagen.official import HEADS
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer

GENERATOR_ENTRIES = ("ema", "model")  # the official scripts load the average


KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "slot_embeddings.weight": "holistic_embedding.weight",
        "tok_embeddings.weight": "patch_embedding.weight",
        "slot_pos.weight": "holistic_positions",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.holistic": "holistic_output.weight",
        "output.patches": "patch_output.weight",
    },
    drop=("freqs_cis", "*.kv_cache.*"),
)


WIDE_HEADS = {**HEADS, (1920, 48): 32}


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    lookup: Lookup = "official",
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    where: str = "the Hita checkpoint",
) -> HitaAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the tokenizer's layout."""
    split = {name: tensor for name, tensor in state.items() if name != "output.weight"}
    first = state["slot_embeddings.weight"].shape[0]
    split |= {"output.holistic": state["output.weight"][:first], "output.patches": state["output.weight"][first:]}
    width = state["norm.weight"].shape[0]
    depth = count(state, r"layers\.(\d+)\.")
    if num_heads is None and (width, depth) not in WIDE_HEADS:
        raise UserError(f"no published Hita generator has width {width} and depth {depth}: give --num_heads")
    generator = HitaAR(
        layout,
        width,
        depth,
        num_heads or WIDE_HEADS[width, depth],
        state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        condition_dropout,
        dropout,
        _multiple(width, state["layers.0.feed_forward.w1.weight"].shape[0]),
        norm_eps,
        rope_base,
        lookup,
    )
    sizes = (first, state["tok_embeddings.weight"].shape[0])
    if generator.vocabularies != sizes or generator.holistic != state["slot_pos.weight"].shape[0]:
        raise UserError(f"{where} predicts {sizes} codes, but the tokenizer gives {layout}: give its own tokenizer")
    load_strict(generator, KEYS.from_official(split, where), where)
    return generator.eval()


def _multiple(width: int, hidden: int) -> int:
    """256 where it gives the hidden size of the feed-forward layer, else that size itself."""
    return 256 if -(-int(8 * width / 3) // 256) * 256 == hidden else hidden


def to_official(generator: HitaAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    state = KEYS.to_official(generator.state_dict())
    heads = state.pop("output.holistic"), state.pop("output.patches")
    return {**state, "output.weight": torch.cat(heads)}


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> Generator:
    """What `convert.py import hita` makes of a generator's file."""
    generator = from_official(state, tokenizer.layout, options.num_heads)
    return generator
