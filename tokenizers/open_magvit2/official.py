"""Open-MAGVIT2's tokenizer checkpoints (arXiv 2409.04410, `imagenet_{256,128}_L.ckpt`), official keys
to ours and back.

Sizes are read from the tensors' shapes; the average is taken, as the paper evaluates it. A
generator's checkpoint (`AR_256_B.ckpt`) is one too: the tokenizer in it, which was loaded without
averaging. How bits are split into sub-tokens no file says: 6 and 12 of 18 as published.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.binary_cnn import binary_cnn_keys
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable
from tessellar.interop.lightning import tokenizer_weights
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.open_magvit2.tokenizer import OpenMAGVIT2
from tessellar.tokenizers.quantizers.lfq import LFQ

SPLIT = (6, 12)


def from_official(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] = 256,
    split: tuple[int, ...] | None = None,
    where: str = "",
) -> OpenMAGVIT2:
    """A tokenizer with the sizes that the weights show, filled with them; `split` are the bits of
    each sub-token.

    Raises UserError for weights of something else, and where the split is neither given nor known.
    """
    OFFICIAL.check(state)
    weights = tokenizer_weights(state)
    cnn = cnn_sizes(weights, "encoder.down.{i}.block.{j}", len(weights["encoder.conv_in.weight"]))
    bits = len(weights["encoder.conv_out.bias"])
    if split is None:
        if bits != sum(SPLIT):
            raise UserError(
                f"how tokens of {bits} bits are split is not known: give --variant, such as 6+{bits - 6}"
            )
        split = SPLIT
    if sum(split) != bits:
        raise UserError(
            f"these weights have tokens of {bits} bits, not {'+'.join(map(str, split))}"
        )
    made = OpenMAGVIT2(
        LFQ(bits, split=split),
        image_size,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: OpenMAGVIT2) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _keys_of(tokenizer: OpenMAGVIT2) -> KeyTable:
    return binary_cnn_keys(len(tokenizer.encoder.levels))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> OpenMAGVIT2:
    """`variant` is the split, such as 6+12."""
    split = None
    if options.variant is not None:
        parts = options.variant.split("+")
        if not all(part.isdecimal() for part in parts):
            raise UserError(
                f"--variant is {options.variant!r}; of Open-MAGVIT2 it is the bits of each sub-token, such as 6+12"
            )
        split = tuple(map(int, parts))
    return from_official(state, options.image_size or 256, split)


OFFICIAL = TokenizerImporter(
    what="an Open-MAGVIT2 tokenizer",
    marks=("*encoder.conv_in.weight", "*decoder.adaptive.{i}.gamma.weight"),
    entries=("state_dict",),
    keys=_keys_of,
    split=tokenizer_weights,
    build=_build,
)
