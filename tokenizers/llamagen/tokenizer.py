"""LlamaGen's image tokenizer: taming's VQGAN with a small, l2-normalised codebook (arXiv
2406.06525, section 2.1).

Convolutional encoder and decoder (arXiv 2012.09841), attention only at the coarsest level,
downsampling padded at the right and bottom only. Different from the official code: no queue of
recent codes (usage is a callback's business), and codes can be restarted.
"""

from tessellar.layers.cnn import Sizes
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.parts.vqgan import TamingVQGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


class LlamaGenVQ(TamingVQGAN):
    """VQGAN over images of `image_size` (one side, or height and width); convolutional, so any
    multiple of the stride.

    `decoder_multipliers` None: those of the encoder. Raises ValueError where the stride does not
    divide the image size.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        dropout: float = 0.0,
        decoder_multipliers: tuple[int, ...] | None = None,
    ) -> None:
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels, dropout)
        decoding = sizes.decoding(decoder_multipliers)
        super().__init__(quantizer, image_size, encoding=sizes, decoding=decoding)


def vq_16(
    image_size: int | tuple[int, int] = 256, vocab_size: int = 16384, code_dim: int = 8
) -> LlamaGenVQ:
    """71,883,403 parameters; 16 x 16 tokens at 256 pixels."""
    return LlamaGenVQ(
        VectorQuantizer(vocab_size, code_dim), image_size, multipliers=(1, 1, 2, 2, 4)
    )


def vq_8(
    image_size: int | tuple[int, int] = 256, vocab_size: int = 16384, code_dim: int = 8
) -> LlamaGenVQ:
    """70,109,835 parameters; 32 x 32 tokens at 256 pixels."""
    return LlamaGenVQ(VectorQuantizer(vocab_size, code_dim), image_size, multipliers=(1, 2, 2, 4))
