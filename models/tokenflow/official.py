"""The checkpoint of TokenFlow's text-to-image generator (arXiv 2412.03069), official keys to ours and
back: a Llama in transformers' names with another block. (The tokenizer: tokenizers/tokenflow.)

Sizes are read from the tensors' shapes; heads have the channels of their norms. The marks around an
image and the negative text are ids of a text tokenizer that no weight shows: they are arguments.
Rotated halves of a head, theirs, become adjacent pairs, ours.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.tokenflow.model import TokenFlowAR
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "model.embed_tokens.weight": "token_embedding.weight",
        "model.layers.{i}.self_attn.wqkv.weight": "layers.{i}.attention.wqkv.weight",
        "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.wo.weight",
        "model.layers.{i}.self_attn.qknorm.query_norm.weight": "layers.{i}.attention.q_norm.weight",
        "model.layers.{i}.self_attn.qknorm.key_norm.weight": "layers.{i}.attention.k_norm.weight",
        "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.feed_forward.w1.weight",
        "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.feed_forward.w3.weight",
        "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.feed_forward.w2.weight",
        "model.layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.ffn_norm.weight",
        "model.norm.weight": "norm.weight",
        "model.mm_projector.{i}.{tensor}": "project.{i}.{tensor}",
        "model.lvl_embed.weight": "scale_embedding.weight",
        "model.pos_1LC": "place_embedding",
        "lm_head.weight": "output.weight",
    },
    # The vision tower is the tokenizer, which has a file of its own; two ids may be there as buffers.
    drop=("model.vision_tower.*", "*image_token_start", "*image_token_end", "*.rotary_emb.inv_freq"),
)  # fmt: skip
PROJECTION = re.compile(r"(model\.layers\.\d+\.self_attn)\.([qkv])_proj\.weight")
NORM = re.compile(r"model\.layers\.\d+\.self_attn\.qknorm\.\w+_norm\.weight")
FIRST_NORM = "model.layers.0.self_attn.qknorm.query_norm.weight"


def pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (half, j) of each head to rows (j, half)."""
    return rearrange(rows, "(h two d) ... -> (h d two) ...", two=2, d=head_dim // 2)


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `pairs`."""
    return rearrange(rows, "(h d two) ... -> (h two d) ...", two=2, d=head_dim // 2)


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, whose heads and their norms have adjacent pairs."""
    head_dim = len(state[FIRST_NORM])
    result = {}
    for key, tensor in state.items():
        found = PROJECTION.fullmatch(key)
        if NORM.fullmatch(key):
            result[key] = pairs(tensor, head_dim)
        elif found and found[2] == "q":
            q, k, v = (_need(state, f"{found[1]}.{name}_proj.weight") for name in "qkv")
            fused = torch.cat([pairs(q, head_dim), pairs(k, head_dim), v])
            result[f"{found[1]}.wqkv.weight"] = fused
        elif not found:
            result[key] = tensor
    return result


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserError(f"the TokenFlow generator lacks {key}")
    return state[key]


def join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`."""
    head_dim = len(state[FIRST_NORM])
    result = {}
    for key, tensor in state.items():
        if NORM.fullmatch(key):
            result[key] = halves(tensor, head_dim)
        elif key.endswith(".wqkv.weight"):
            place = key.removesuffix(".wqkv.weight")
            q, k, v = tensor.chunk(3)
            result[f"{place}.q_proj.weight"] = halves(q, head_dim)
            result[f"{place}.k_proj.weight"] = halves(k, head_dim)
            result[f"{place}.v_proj.weight"] = v
        else:
            result[key] = tensor
    return result


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    text_length: int = 128,
    opening: tuple[int, ...] = (),
    closing: tuple[int, ...] = (),
    bos: int = 1,
    negative: tuple[int, ...] = (),
    **options: Any,
) -> TokenFlowAR:
    """A generator of the sizes that the weights show, over the tokens of `layout`; `options` are
    TokenFlowAR's epsilons and the base of its rotation.

    Raises UserError where they do not fit the tokenizer's layout.
    """
    OFFICIAL.check(state)
    length, width = state["model.pos_1LC"].shape
    if length != layout.length:
        raise UserError(f"this generator is for {length} tokens, but the tokenizer gives {layout}")
    codes = int(layout.vocab().max()) if layout.is_categorical else 0
    text_vocab = len(state["lm_head.weight"]) - codes - 1
    if text_vocab < 1:
        raise UserError(
            f"this generator has {len(state['lm_head.weight'])} ids with its text, but the tokenizer gives {layout}"
        )
    generator = TokenFlowAR(
        layout,
        width,
        depth=count(state, r"model\.layers\.(\d+)\."),
        num_heads=width // len(state[FIRST_NORM]),
        text_vocab=text_vocab,
        text_length=text_length,
        opening=opening,
        closing=closing,
        bos=bos,
        negative=negative,
        latent_dim=state["model.mm_projector.0.weight"].shape[1],
        ffn_hidden=len(state["model.layers.0.mlp.gate_proj.weight"]),
        **options,
    )
    return OFFICIAL.fill(generator, state)


def to_official(generator: TokenFlowAR) -> dict[str, Tensor]:
    """The official state dict of a text-conditional generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> TokenFlowAR:
    return from_official(state, layout)


OFFICIAL = GeneratorImporter(
    what="a TokenFlow generator",
    marks=("model.pos_1LC", "model.lvl_embed.weight", FIRST_NORM),
    entries=("model",),  # the published file is the state dict itself
    keys=KEYS,
    split=split,
    join=join,
    build=_build,
)
