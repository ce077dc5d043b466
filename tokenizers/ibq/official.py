"""IBQ's tokenizer checkpoints (arXiv 2412.02692, `imagenet256_{1024,8192,16384,262144}.ckpt`,
`IBQ_pretrain_*.ckpt`), official keys to ours and back.

Sizes are read from the tensors' shapes; the average is taken, as the paper evaluates it. A
generator's checkpoint (`AR_256_*.ckpt`) is one too: the tokenizer in it, with which it samples.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule
from tessellar.interop.lightning import tokenizer_weights
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.ibq.tokenizer import IBQVQGAN
from tessellar.tokenizers.kl_vae import official as kl_vae
from tessellar.tokenizers.quantizers.ibq import IBQ


def from_official(
    state: Mapping[str, Tensor], image_size: int | tuple[int, int] = 256, where: str = ""
) -> IBQVQGAN:
    """A tokenizer with the sizes that the weights show, filled with them.

    Raises UserError for weights of something else.
    """
    OFFICIAL.check(state)
    weights = tokenizer_weights(state)
    cnn = cnn_sizes(weights, "encoder.down.{i}.block.{j}", len(weights["encoder.conv_in.weight"]))
    vocab, dim = weights["quantize.embedding.weight"].shape
    attention = {
        int(found[1])
        for name in weights
        if (found := re.match(r"encoder\.down\.(\d+)\.attn", name))
    }
    made = IBQVQGAN(
        IBQ(vocab, dim),
        image_size,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
        z_channels=len(weights["encoder.conv_out.bias"]),
        attention=tuple(sorted(attention)),
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: IBQVQGAN) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _keys_of(tokenizer: IBQVQGAN) -> KeyTable:
    """The halves are taming's, as the KL VAE's."""
    halves = kl_vae.keys(len(tokenizer.encoder.levels))
    codebook = Rule("quantize.embedding.weight", "quantizer.codebook.weight")
    return KeyTable((*halves.rules, codebook))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> IBQVQGAN:
    return from_official(state, options.image_size or 256)


OFFICIAL = TokenizerImporter(
    what="an IBQ tokenizer",
    marks=("*encoder.down.0.block.0.conv1.bias", "*quantize.embedding.weight"),
    entries=("state_dict",),
    keys=_keys_of,
    split=tokenizer_weights,
    build=_build,
)
