"""BAR-FSQ's checkpoints (arXiv 2602.09024, `bar_fsq_16bits{,_ft}.bin`, `bar_sfq_10bits_res512.bin`),
official keys to ours and back.

Keys are those of the modules in the official code; no file was read. The untouched tower, which lies
in a file twice, and the layers of the alignment are of training alone and left out. Positions of the
tower's 16 x 16 grid are resized to the decoder's grid, as they are there at every pass.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import count
from tessellar.tokenizers.bar_fsq.tokenizer import BARFSQ, resized_table
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ

HEADS = {1152: 16, 1024: 16}  # width -> heads of the published parts
_LAYER = "encoder.trainable_encoder.layers.{i}"
_PARTS = ("q_proj", "k_proj", "v_proj")
PAIRS = {
    "encoder.siglip.embeddings.patch_embedding.{tensor}": "patch_in.{tensor}",
    f"{_LAYER}.layer_norm1.{{tensor}}": "encoder.{i}.attention_norm.{tensor}",
    f"{_LAYER}.layer_norm2.{{tensor}}": "encoder.{i}.mlp_norm.{tensor}",
    f"{_LAYER}.self_attn.qkv.{{tensor}}": "encoder.{i}.qkv.{tensor}",
    f"{_LAYER}.self_attn.out_proj.{{tensor}}": "encoder.{i}.proj.{tensor}",
    f"{_LAYER}.mlp.fc1.{{tensor}}": "encoder.{i}.fc1.{tensor}",
    f"{_LAYER}.mlp.fc2.{{tensor}}": "encoder.{i}.fc2.{tensor}",
    "encoder.trainable_post_layernorm.{tensor}": "encoder_norm.{tensor}",
    "quantize.in_proj.{tensor}": "to_code.{tensor}",
    "quantize.out_proj.{tensor}": "from_code.{tensor}",
    "decoder.ln_pre.{tensor}": "norm_in.{tensor}",
    "decoder.transformer.{i}.norm1.{tensor}": "decoder.{i}.attention_norm.{tensor}",
    "decoder.transformer.{i}.norm2.{tensor}": "decoder.{i}.mlp_norm.{tensor}",
    "decoder.transformer.{i}.attn.qkv.{tensor}": "decoder.{i}.qkv.{tensor}",
    "decoder.transformer.{i}.attn.proj.{tensor}": "decoder.{i}.proj.{tensor}",
    "decoder.transformer.{i}.mlp.fc1.{tensor}": "decoder.{i}.fc1.{tensor}",
    "decoder.transformer.{i}.mlp.fc2.{tensor}": "decoder.{i}.fc2.{tensor}",
    "decoder.ln_post.{tensor}": "decoder_norm.{tensor}",
    "decoder.ffn.0.bias": "to_pixels.bias",
    "decoder.conv_out.{tensor}": "smooth.{tensor}",
}
DROPPED = (
    "encoder.siglip.encoder.*",
    "encoder.siglip.post_layernorm.*",
    "encoder.siglip.head.*",
    "encoder.frozen_encoder.*",
    "encoder.frozen_post_layernorm.*",
    "decoder.clip_projector.*",
)


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of the tower's layers as one tensor."""
    found = {}
    for name, tensor in state.items():
        if ".trainable_encoder." not in name or not any(f".{part}." in name for part in _PARTS):
            found[name] = tensor
        elif ".q_proj." in name:
            parts = [state.get(name.replace("q_proj", part)) for part in _PARTS]
            if any(part is None for part in parts):
                raise UserError(f"the file has {name}, but not the other two of {_PARTS}")
            found[name.replace("q_proj", "qkv")] = torch.cat([p for p in parts if p is not None])
    return found


def join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`."""
    found = {}
    for name, tensor in state.items():
        if ".self_attn.qkv." in name:
            for part, own in zip(_PARTS, tensor.chunk(3), strict=True):
                found[name.replace("qkv", part)] = own
        else:
            found[name] = tensor
    return found


def keys_of(tokenizer: BARFSQ) -> KeyTable:
    """The table, whose positions depend on the grid."""
    return table(
        PAIRS,
        Rule(
            "encoder.siglip.embeddings.position_embedding.weight",
            "positions",
            lambda t: resized_table(t[None], tokenizer.side),
            lambda t: t[0],
        ),
        Rule("decoder.class_embedding", "class_token", lambda t: t[None], lambda t: t[0]),
        Rule(
            "decoder.positional_embedding", "decoder_positions", lambda t: t[None], lambda t: t[0]
        ),
        Rule(
            "decoder.ffn.0.weight",
            "to_pixels.weight",
            lambda t: rearrange(t, "p d 1 1 -> p d"),
            lambda t: rearrange(t, "p d -> p d 1 1"),
        ),
        drop=DROPPED,
    )


def from_official(
    state: Mapping[str, Tensor],
    heads: tuple[int, int] | None = None,
    where: str = "the BAR-FSQ checkpoint",
) -> BARFSQ:
    """A tokenizer with the sizes that the weights show, filled with them; `heads` are those of encoder
    and decoder.

    Raises UserError for weights of something else, and where no published part has a width and no
    heads are given.
    """
    OFFICIAL.check(state)
    weights = split(state)
    bits, width = weights["quantize.in_proj.weight"].shape
    decoder_width = len(weights["quantize.out_proj.weight"])
    if heads is None:
        for part in (width, decoder_width):
            if part not in HEADS:
                raise UserError(f"no published BAR-FSQ has width {part}: give --num-heads")
        heads = (HEADS[width], HEADS[decoder_width])
    side = isqrt(len(weights["decoder.positional_embedding"]) - 1)
    patch = isqrt(len(weights["decoder.ffn.0.bias"]) // 3)
    made = BARFSQ(
        BinaryFSQ(bits, centred=False),
        side * patch,
        patch,
        width=width,
        depth=count(weights, r"encoder\.trainable_encoder\.layers\.(\d+)\."),
        num_heads=heads[0],
        mlp_ratio=len(weights["encoder.trainable_encoder.layers.0.mlp.fc1.bias"]) / width,
        decoder_width=decoder_width,
        decoder_depth=count(weights, r"decoder\.transformer\.(\d+)\."),
        decoder_heads=heads[1],
        norm_in=True,
        decoder_eps=1e-5,
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: BARFSQ) -> dict[str, Tensor]:
    """The official state dict of our tokenizer, without what is of training alone; the inverse of
    `from_official`.
    """
    return OFFICIAL.to_official(tokenizer)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> BARFSQ:
    return from_official(state, options.heads)


OFFICIAL = TokenizerImporter(
    what="a BAR-FSQ tokenizer",
    marks=("*encoder.trainable_post_layernorm.weight", "*quantize.in_proj.weight"),
    entries=FLAT,
    keys=keys_of,
    split=split,
    join=join,
    build=_build,
    paper="bar_fsq",
)
