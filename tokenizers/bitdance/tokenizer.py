"""BitDance's binary autoencoder: each cell becomes the signs of z channels, a "codebook" of 2^z codes
without a table (arXiv 2602.14041; ancestor WeTok, arXiv 2508.05599).

Convolutions alone, the decoder modulated by the codes' statistics and, as a GAN's generator, fed
with noise beside them if wanted. Its training code is not published: the losses and the second stage
(`train="decoder"`: codes stay, the noise-fed decoder learns) are WeTok's.
"""

from typing import Literal

from torch import Tensor

from tessellar.layers.cnn import Sizes
from tessellar.layers.cnn_binary import BinaryDecoder, BinaryEncoder
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.ranges import check_name
from tessellar.protocol.tokenizer import Quantizer, TokenizerOutput
from tessellar.tokenizers.parts.noisy_decoder import NoisyDecoder, freeze_codes
from tessellar.tokenizers.quantizers.lfq import LFQ

Trained = Literal["all", "decoder"]
GROUP_BITS = 8  # of the entropies, as WeTok's


class BinaryAutoencoder(NoisyDecoder):
    """Images of `image_size` (one side, or height and width) as a grid of signs.

    `noisy`: the decoder reads noise beside the codes. `train` says what a run trains. Raises
    ValueError where the stride does not divide the size.
    """

    encoder: BinaryEncoder

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 256,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
        noisy: bool = False,
        train: Trained = "all",
    ) -> None:
        super().__init__(image_size, stride=2 ** (len(multipliers) - 1))
        check_name("train", train, ("all", "decoder"))
        self.layout = grid_layout(*self.grid, quantizer.kind)
        self.noisy = noisy
        self.train_codes = train == "all"
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, quantizer.dim)
        self.encoder = BinaryEncoder(sizes)
        self.decoder = BinaryDecoder(sizes, (2 if noisy else 1) * quantizer.dim)
        self.quantizer = quantizer
        if not self.train_codes:
            freeze_codes(self)

    def forward(self, images: Tensor) -> TokenizerOutput:
        output = super().forward(images)
        return output if self.train_codes else output._replace(losses={})


def signs(bits: int, bounded: bool = False) -> LFQ:
    """Tokens of `bits` bits; entropies over groups of 8, as WeTok's. Bounded features need no
    commitment: the entropy alone draws them to -1 and 1 (UniWeTok).
    """
    groups = bits // GROUP_BITS if bits % GROUP_BITS == 0 else bits
    return LFQ(bits, groups, form="bits", commitment_weight=0.0 if bounded else 0.25)


# Published variants: bits a token, pixels a side of it; PSNR and SSIM on ImageNet's validation set. The sizes of the
# last two are taken to be those of the first with one more level; an importer reads all sizes from the weights.
def ae_d16c32(
    image_size: int = 256, noisy: bool = False, train: Trained = "all"
) -> BinaryAutoencoder:
    """32 bits, 16 pixels: what BitDance's ImageNet models read. 460,294,179 parameters (`noisy`:
    460,589,091); 24.90, 0.72.
    """
    return BinaryAutoencoder(signs(32), image_size, noisy=noisy, train=train)


def ae_d32c128(
    image_size: int = 256, noisy: bool = False, train: Trained = "all"
) -> BinaryAutoencoder:
    """128 bits, 32 pixels; 23.26, 0.67."""
    sizes = (1, 1, 2, 2, 4, 4)
    return BinaryAutoencoder(signs(128), image_size, 256, sizes, noisy=noisy, train=train)


def ae_d32c256(
    image_size: int = 256, noisy: bool = False, train: Trained = "all"
) -> BinaryAutoencoder:
    """256 bits, 32 pixels; 25.29, 0.74."""
    sizes = (1, 1, 2, 2, 4, 4)
    return BinaryAutoencoder(signs(256), image_size, 256, sizes, noisy=noisy, train=train)
