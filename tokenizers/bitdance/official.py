"""BitDance's autoencoders (arXiv 2602.14041): `ae_d16c32.pt`, `ae_d*.safetensors`, and the copy in the
files of its generators (`vae.*`); keys to and fro.

All sizes are read from the tensors' shapes, but the groups of bits of the training loss: 8 bits each
unless told otherwise.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.binary_cnn import binary_cnn_keys
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable
from tessellar.interop.lightning import tokenizer_weights
from tessellar.interop.sizes import CNNSizes, cnn_sizes
from tessellar.tokenizers.bitdance.tokenizer import BinaryAutoencoder, signs
from tessellar.tokenizers.quantizers.lfq import LFQ

INSIDE = "vae."  # of the generators' files


def encoder_sizes(state: Mapping[str, Tensor], prefix: str = "") -> CNNSizes:
    """Sizes that an encoder's weights show."""
    channels = len(state[f"{prefix}encoder.conv_in.weight"])
    return cnn_sizes(state, prefix + "encoder.down.{i}.block.{j}", channels)


def from_official(
    state: Mapping[str, Tensor],
    image_size: int | tuple[int, int] = 256,
    groups: int | None = None,
) -> BinaryAutoencoder:
    """An autoencoder with the sizes that the weights show, filled with them; `groups` of bits share
    an entropy in training.
    """
    importer = INNER if INNER.holds(state) else PLAIN
    importer.check(state)
    prefix = INSIDE if importer is INNER else ""
    sizes = encoder_sizes(state, prefix)
    bits = len(state[f"{prefix}encoder.conv_out.weight"])
    quantizer = signs(bits) if groups is None else LFQ(bits, groups, form="bits")
    made = BinaryAutoencoder(
        quantizer,
        image_size,
        channels=sizes.channels,
        multipliers=sizes.multipliers,
        num_res_blocks=sizes.blocks,
        noisy=state[f"{prefix}decoder.conv_in.weight"].shape[1] == 2 * bits,
    )
    return importer.fill(made, state)


def to_official(tokenizer: BinaryAutoencoder) -> dict[str, Tensor]:
    """Official state dict of an autoencoder; the inverse of `from_official`."""
    return PLAIN.to_official(tokenizer)


def _plain_keys(tokenizer: BinaryAutoencoder) -> KeyTable:
    return binary_cnn_keys(len(tokenizer.encoder.levels))


def _inner_keys(tokenizer: BinaryAutoencoder) -> KeyTable:
    """Of a generator's file: all that is no autoencoder's is the generator's."""
    generator = "cls_embedding.* proj_in.* emb_norm.* layers.* norm.* head.* pos_for_diff.*"
    rules = binary_cnn_keys(len(tokenizer.encoder.levels), INSIDE).rules
    return KeyTable(rules, drop=(*generator.split(), "query_token"))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> BinaryAutoencoder:
    return from_official(state, options.image_size or 256)


PLAIN = TokenizerImporter(
    what="a binary autoencoder of BitDance",
    marks=("encoder.conv_in.weight", "encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.*"),
    entries=("state_dict",),
    keys=_plain_keys,
    split=tokenizer_weights,
    build=_build,
)

INNER = TokenizerImporter(
    what="a binary autoencoder in a file of a BitDance generator",
    marks=("vae.encoder.conv_in.weight", "vae.decoder.adaptive.0.*", "cls_embedding.weight"),
    entries=("ema", "model"),
    keys=_inner_keys,
    build=_build,
)

OFFICIAL = (PLAIN, INNER)
