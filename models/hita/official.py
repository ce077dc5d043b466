"""Hita's generator checkpoints (arXiv 2507.02358), official keys to ours and back.

One official matrix holds both heads, ours are two. Imported weights sample with the official
look-up by default.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, ffn_multiple
from tessellar.models.hita.model import HitaAR, Lookup
from tessellar.models.llamagen.official import HEADS
from tessellar.protocol.layout import Layout

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
    """A generator of the sizes that the weights show; raises UserError where they do not fit the
    tokenizer's layout.
    """
    OFFICIAL.check(state)
    first = state["slot_embeddings.weight"].shape[0]
    width = state["norm.weight"].shape[0]
    depth = count(state, r"layers\.(\d+)\.")
    if num_heads is None and (width, depth) not in WIDE_HEADS:
        raise UserError(
            f"no published Hita generator has width {width} and depth {depth}: give --num_heads"
        )
    generator = HitaAR(
        layout,
        width,
        depth=depth,
        num_heads=num_heads or WIDE_HEADS[width, depth],
        num_classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        condition_dropout=condition_dropout,
        dropout=dropout,
        ffn_multiple_of=ffn_multiple(width, state["layers.0.feed_forward.w1.weight"].shape[0]),
        norm_eps=norm_eps,
        rope_base=rope_base,
        lookup=lookup,
    )
    sizes = (first, state["tok_embeddings.weight"].shape[0])
    if generator.vocabularies != sizes or generator.holistic != state["slot_pos.weight"].shape[0]:
        raise UserError(
            f"{where} predicts {sizes} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: HitaAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def split_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads apart: rows of the holistic codes come first."""
    rest = {name: tensor for name, tensor in state.items() if name != "output.weight"}
    first = len(state["slot_embeddings.weight"])
    heads = state["output.weight"]
    return {**rest, "output.holistic": heads[:first], "output.patches": heads[first:]}


def join_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rest = dict(state)
    heads = [rest.pop("output.holistic"), rest.pop("output.patches")]
    return {**rest, "output.weight": torch.cat(heads)}


OFFICIAL = GeneratorImporter(
    what="a Hita generator",
    marks=("slot_pos.weight", "slot_embeddings.weight"),
    entries=("ema", "model"),  # the official scripts load the average
    keys=KEYS,
    split=split_heads,
    join=join_heads,
    build=by_heads(from_official),
)
