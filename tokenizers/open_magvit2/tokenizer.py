"""Open-MAGVIT2's tokenizer (arXiv 2409.04410, section 3.1): a convolutional autoencoder with a
lookup-free quantizer between its halves.

A token is 18 signs; a generator reads them as sub-tokens of 6 and 12 bits, the first channel of each
the least significant. Different from the official code: images of evaluation are those of exact
codes, not of z + (codes - z).
"""

from torch import nn

from tessellar.layers.cnn import Sizes
from tessellar.layers.cnn_binary import BinaryDecoder, BinaryEncoder
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.parts.vqgan import VQGAN
from tessellar.tokenizers.quantizers.lfq import LFQ


class OpenMAGVIT2(VQGAN):
    """Images of `image_size` (one side, or height and width) as a grid of codes of signs.

    Raises ValueError where the stride does not divide the size.
    """

    encoder: BinaryEncoder
    decoder: BinaryDecoder

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
    ) -> None:
        super().__init__(image_size, stride=2 ** (len(multipliers) - 1))
        self.layout = grid_layout(*self.grid, quantizer.kind)
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, quantizer.dim)
        self.encoder = BinaryEncoder(sizes)
        self.decoder = BinaryDecoder(sizes)
        self.quantizer = quantizer
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()


def open_magvit2_256(image_size: int | tuple[int, int] = 256) -> OpenMAGVIT2:
    """115,127,829 parameters; 16 x 16 tokens of 2^6 and 2^12 codes at 256 pixels."""
    return OpenMAGVIT2(LFQ(18, split=(6, 12)), image_size)


def open_magvit2_128(image_size: int | tuple[int, int] = 128) -> OpenMAGVIT2:
    """112,021,653 parameters; 16 x 16 tokens at 128 pixels, 32 x 32 at 256."""
    return OpenMAGVIT2(LFQ(18, split=(6, 12)), image_size, multipliers=(1, 2, 2, 4))
