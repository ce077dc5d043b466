"""Token-Shuffle weights (arXiv 2504.17789) to ours and back, and warm starts; no checkpoint of the
paper is public.

Names are those of the method's written form: separate q, k, v, one joint vocabulary `[text, BOI,
EOI, codes]`. A warm start takes the backbone of a text Llama in Hugging Face's names, or of a
LlamaGen generator (windows of one code).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.models.token_shuffle.model import TokenShuffle
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "tok_embeddings.weight": "token_embedding.weight",
        "shuffle.compress.{tensor}": "shuffle.compress.{tensor}",
        "shuffle.blocks.{k}.{layer}.{tensor}": "shuffle.blocks.{k}.{layer}.{tensor}",
        "unshuffle.blocks.{k}.{layer}.{tensor}": "unshuffle.blocks.{k}.{layer}.{tensor}",
        "unshuffle.expand.{tensor}": "unshuffle.expand.{tensor}",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    }
)


QKV = ("wq", "wk", "wv")


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a state dict tell; `window` is None where nothing is compressed."""

    width: int
    depth: int
    kv_width: int
    ffn_hidden: int
    vocab: int
    window: int | None
    blocks: int
    ratio: float
    tied: bool


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """Sizes of a state dict; raises UserError where it lacks the tensors that tell them."""
    OFFICIAL.check(state)
    vocab, width = state["tok_embeddings.weight"].shape
    compress = state.get("shuffle.compress.weight")
    hidden = state.get("shuffle.blocks.0.fc1.bias")
    return Sizes(
        width=width,
        depth=_count(state, "layers."),
        kv_width=len(state["layers.0.attention.wk.weight"]),
        ffn_hidden=len(state["layers.0.feed_forward.w1.weight"]),
        vocab=vocab,
        window=None if compress is None else isqrt(width // len(compress)),
        blocks=_count(state, "shuffle.blocks."),
        ratio=1.0 if hidden is None else len(hidden) / width,
        tied="output.weight" not in state,
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = (
        int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)
    )
    return 1 + max(numbers, default=-1)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int,
    bos: int = 0,
    rope_base: float = 10000.0,
    norm_eps: float = 1e-5,
    z_loss: float | None = None,
) -> TokenShuffle:
    """Our generator with these weights, over the tokens of `layout`; raises UserError where they do
    not fit.
    """
    sizes = sizes_of(state)
    codes = int(layout.vocab().max()) if layout.is_categorical else 0
    if sizes.vocab - codes < 3:
        raise UserError(
            f"this generator has {sizes.vocab} tokens with its text, but the tokenizer gives {layout}"
        )
    if sizes.width % num_heads or sizes.kv_width % (sizes.width // num_heads):
        raise UserError(
            f"{num_heads} heads do not divide the width {sizes.width} and {sizes.kv_width} of the keys"
        )
    generator = TokenShuffle(
        layout,
        sizes.width,
        sizes.depth,
        num_heads,
        window=sizes.window or 1,
        mlp_blocks=sizes.blocks,
        mlp_ratio=sizes.ratio,
        text_vocab=sizes.vocab - codes - 2,
        bos=bos,
        z_loss=z_loss,
        rope_base=rope_base,
        project=sizes.window is not None,
        tied=sizes.tied,
        num_kv_heads=sizes.kv_width // (sizes.width // num_heads),
        ffn_hidden=sizes.ffn_hidden,
        norm_eps=norm_eps,
    )
    return OFFICIAL.fill(generator, state)


def to_official(generator: TokenShuffle) -> dict[str, Tensor]:
    """The state dict under the method's names; the inverse of `from_official`, for generators with
    joint text.
    """
    return OFFICIAL.to_official(generator)


def from_config(
    state: Mapping[str, Tensor], config: Mapping[str, Any], layout: Layout, bos: int = 0
) -> TokenShuffle:
    """Our generator from weights and the recorded option names; raises UserError for another order
    of the tokens.
    """
    text = config["text_vocab"]
    order = (config["boi"], config["eoi"], config["image_vocab_start"])
    if order != (text, text + 1, text + 2):
        raise UserError(
            f"the vocabulary must be [text, BOI, EOI, codes]; BOI, EOI and the codes begin at {order}"
        )
    made = from_official(
        state,
        layout,
        num_heads=config["heads"],
        bos=bos,
        rope_base=config.get("rope_theta", 10000.0),
        norm_eps=config.get("norm_eps", 1e-5),
        z_loss=config.get("z_coefficient"),
    )
    if made.codes != config["window"] ** 2 and made.codes > 1:
        raise UserError(
            f"the weights fuse {made.codes} codes, the config {config['window']}x{config['window']}"
        )
    return made


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> TokenShuffle:
    if options.num_heads is None:
        raise UserError(
            "the weights do not tell the number of heads of a Token-Shuffle generator: give --num_heads"
        )
    return from_official(state, layout, options.num_heads)


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one wqkv a layer; raises UserError where one of the three is missing."""
    fused = {}
    for key, tensor in state.items():
        layer = key.rsplit(".", 2)[-2]
        if layer not in QKV:
            fused[key] = tensor
        elif layer == "wq":
            parts = [key.replace("wq", name) for name in QKV]
            missing = set(parts) - state.keys()
            if missing:
                raise UserError(f"the Token-Shuffle checkpoint lacks {', '.join(sorted(missing))}")
            fused[key.replace("wq", "wqkv")] = torch.cat([state[part] for part in parts])
    return fused


def part_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with wq, wk and wv in place of wqkv: as many rows of q as columns, of k and v half
    of the others.
    """
    parted = {}
    for key, tensor in state.items():
        if not key.endswith("attention.wqkv.weight"):
            parted[key] = tensor
            continue
        width = tensor.shape[1]
        kv_width = (len(tensor) - width) // 2
        for name, part in zip(QKV, tensor.split((width, kv_width, kv_width)), strict=True):
            parted[key.replace("wqkv", name)] = part
    return parted


OFFICIAL = GeneratorImporter(
    what="a Token-Shuffle generator",
    marks=(
        "tok_embeddings.weight",
        "layers.0.attention.wk.weight",
        "layers.0.feed_forward.w1.weight",
    ),
    entries=("model", "module", "state_dict"),  # as LlamaGen's files; none of its own is published
    keys=KEYS,
    split=fuse_qkv,
    join=part_qkv,
    build=_build,
)
