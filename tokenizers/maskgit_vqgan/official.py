"""TiTok's checkpoints (arXiv 2406.07550, 2501.07730), which One-D-Piece's share (arXiv 2501.10064): keys to and fro.

Tokenizers of all kinds (two-stage, single-stage, KL), the MaskGIT-VQGAN whose codes they predict, the discriminator.
Sizes are read from the tensors' shapes; heads have 64 channels as published unless `num_heads` says otherwise. Old
two-stage weights (with a head of scores) mix tokens, the others do not.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, KeyTable, table
from tessellar.interop.maskgit_cnn import half, upsampling
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.official import _own


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
    missing = [
        k for k in ("encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight") if k not in state
    ]
    if missing:
        raise UserError(f"these are not the weights of a MaskGIT-VQGAN: {', '.join(missing)} is absent")
    vocab, dim = state["quantize.embedding.weight"].shape
    cnn = cnn_sizes(state, "decoder.up.{i}.block.{j}", len(state["encoder.conv_in.weight"]))
    quantizer = VectorQuantizer(vocab, dim, l2_normalize=False)
    made = MaskGITVQGAN(quantizer, image_size, cnn.channels, cnn.multipliers, cnn.blocks)
    ours = vqgan_keys(cnn.levels).from_official(state, "the MaskGIT-VQGAN")
    load_strict(made, {**_own(quantizer), **ours}, "the MaskGIT-VQGAN")
    return made.eval()


def vqgan_to_official(vqgan: MaskGITVQGAN) -> dict[str, Tensor]:
    """Official state dict of a MaskGIT-VQGAN."""
    own = _own(vqgan.quantizer)
    state = {k: v for k, v in vqgan.state_dict().items() if k not in own}
    return vqgan_keys(len(vqgan.decoder.levels)).to_official(state)


def import_vqgan(state: Mapping[str, Tensor], options: ImportOptions) -> MaskGITVQGAN:
    """What `convert.py import maskgit_vqgan` makes of maskgit-vqgan-imagenet-f16-256.bin."""
    return vqgan_from_official(state, options.image_size or 256)
