"""IBQ's tokenizer (arXiv 2412.02692): the VQGAN with index backpropagation quantization.

The straight-through step is on the one-hot index (quantizers/ibq.py), so codebooks of 262,144 codes
of 256 channels stay in use. Convolutional halves are taming's (arXiv 2012.09841), with attention at
the coarsest level.
"""

from tessellar.layers.cnn import Sizes
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.parts.vqgan import TamingVQGAN
from tessellar.tokenizers.quantizers.ibq import IBQ


class IBQVQGAN(TamingVQGAN):
    """Images of `image_size` (one side, or height and width) as a grid of codes.

    `attention` are the levels with attention, 0 the finest; None: the coarsest alone. Raises
    ValueError where the stride does not divide the image size.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
        z_channels: int = 256,
        dropout: float = 0.0,
        attention: tuple[int, ...] | None = None,
    ) -> None:
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels, dropout)
        super().__init__(
            quantizer,
            image_size,
            encoding=sizes,
            decoding=sizes,
            encoder_attention=attention,
            decoder_attention=attention,
        )


# Published variants: 16 x 16 tokens at 256 pixels.          parameters
def ibq_1024(image_size: int | tuple[int, int] = 256) -> IBQVQGAN:
    """107,049,859 parameters."""
    return IBQVQGAN(IBQ(1024, 256), image_size)


def ibq_8192(image_size: int | tuple[int, int] = 256) -> IBQVQGAN:
    """108,884,867 parameters."""
    return IBQVQGAN(IBQ(8192, 256), image_size)


def ibq_16384(image_size: int | tuple[int, int] = 256) -> IBQVQGAN:
    """110,982,019 parameters."""
    return IBQVQGAN(IBQ(16384, 256), image_size)


def ibq_262144(
    image_size: int | tuple[int, int] = 256, rows_at_once: int | None = 1024
) -> IBQVQGAN:
    """173,896,579 parameters; logits of `rows_at_once` vectors at a time are 1 GB."""
    return IBQVQGAN(IBQ(262144, 256, rows_at_once=rows_at_once), image_size)
