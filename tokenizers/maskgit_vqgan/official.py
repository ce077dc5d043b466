"""The MaskGIT-VQGAN (arXiv 2202.04200) as TiTok publishes it, `maskgit-vqgan-imagenet-f16-256.bin`:
keys to and fro.

Sizes are read from the tensors' shapes.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, table
from tessellar.interop.maskgit_cnn import half, upsampling
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def vqgan_keys(levels: int) -> KeyTable:
    """The table of a MaskGIT-VQGAN of that many levels."""
    return table(
        {
            **half("encoder", "encoder", "down"),
            **half("decoder", "decoder", "up"),
            **upsampling("decoder", "decoder", levels),
            "quantize.embedding.weight": "quantizer.codebook.weight",
        }
    )


def vqgan_from_official(state: Mapping[str, Tensor], image_size: int = 256) -> MaskGITVQGAN:
    """A MaskGIT-VQGAN with the sizes that the weights show, filled with them."""
    OFFICIAL.check(state)
    vocab, dim = state["quantize.embedding.weight"].shape
    cnn = cnn_sizes(state, "decoder.up.{i}.block.{j}", len(state["encoder.conv_in.weight"]))
    quantizer = VectorQuantizer(vocab, dim, l2_normalize=False)
    made = MaskGITVQGAN(quantizer, image_size, cnn.channels, cnn.multipliers, cnn.blocks)
    return OFFICIAL.fill(made, state)


def vqgan_to_official(vqgan: MaskGITVQGAN) -> dict[str, Tensor]:
    """Official state dict of a MaskGIT-VQGAN."""
    return OFFICIAL.to_official(vqgan)


def _keys_of(vqgan: MaskGITVQGAN) -> KeyTable:
    return vqgan_keys(len(vqgan.decoder.levels))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> MaskGITVQGAN:
    return vqgan_from_official(state, options.image_size or 256)


OFFICIAL = TokenizerImporter(
    what="a MaskGIT-VQGAN",
    marks=("encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight"),
    entries=FLAT,
    keys=_keys_of,
    own=("quantizer.step", "quantizer.counts"),
    build=_build,
)
