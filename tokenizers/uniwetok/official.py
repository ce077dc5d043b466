"""UniWeTok's checkpoints (arXiv 2602.14178), keys to and fro.

All sizes are read from the tensors' shapes, but heads, which are of 64 channels
unless `num_heads` says otherwise.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.binary_cnn import binary_cnn_keys
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, table
from tessellar.interop.lightning import tokenizer_weights
from tessellar.interop.packed_gates import join_gates, split_gates
from tessellar.interop.sizes import count, heads_of
from tessellar.tokenizers.bitdance.official import encoder_sizes
from tessellar.tokenizers.bitdance.tokenizer import signs
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.uniwetok.tokenizer import UniWeTok


def keys(levels: int) -> KeyTable:
    """The table of a tokenizer of that many levels: the convolutions' after what is UniWeTok's own."""
    pairs = {
        f"decoder.mid_block.{{i}}.{name}": f"decoder.mid.blocks.{{i}}.{name}"
        for name in ("norm1.{tensor}", "norm2.{tensor}", "conv1.{tensor}", "conv2.{tensor}")
    }
    for side, place in (("encoder", "attention"), ("decoder", "mid.attention")):
        theirs = f"{side}.mid_attn_blocks.{{i}}"
        ours = f"{side}.{place}.blocks.{{i}}"
        pairs[f"{side}.register_token.weight"] = f"{side}.{place}.registers"
        for part in ("attention", "feed_forward"):
            pairs[f"{theirs}.{part}.{{layer}}.weight"] = f"{ours}.{part}.{{layer}}.weight"
        pairs[f"{theirs}.{{norm}}.weight"] = f"{ours}.{{norm}}.weight"
    return KeyTable((*table(pairs).rules, *binary_cnn_keys(levels).rules))


def from_official(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] = 256,
    num_heads: int | None = None,
    groups: int | None = None,
) -> UniWeTok:
    """A tokenizer with the sizes that the weights show, filled with them; `groups` of bits share an
    entropy in training.
    """
    OFFICIAL.check(state)
    sizes = encoder_sizes(state)
    bits = len(state["encoder.conv_out.weight"])
    if groups is None:
        quantizer = signs(bits, bounded=True)
    else:
        quantizer = LFQ(bits, groups, form="bits", commitment_weight=0.0)
    made = UniWeTok(
        quantizer,
        image_size,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        num_res_blocks=sizes.blocks,
        attention_depth=count(state, r"encoder\.mid_attn_blocks\.(\d+)\."),
        num_heads=heads_of(state["encoder.register_token.weight"].shape[1], num_heads),
    )
    return OFFICIAL.fill(made, state)


def to_official(tokenizer: UniWeTok) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _keys_of(tokenizer: UniWeTok) -> KeyTable:
    return keys(len(tokenizer.encoder.levels))


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return split_gates(tokenizer_weights(state))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> UniWeTok:
    return from_official(state, options.image_size or 256, options.num_heads)


OFFICIAL = TokenizerImporter(
    what="a UniWeTok tokenizer",
    marks=(
        "encoder.conv_in.weight",
        "encoder.register_token.weight",
        "encoder.mid_attn_blocks.0.attention.wqkv.weight",
    ),
    entries=("state_dict",),
    keys=_keys_of,
    own=("distillation.*", "prior.*"),
    split=_split,
    join=join_gates,
    build=_build,
)
