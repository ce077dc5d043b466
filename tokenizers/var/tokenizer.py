"""VAR's tokenizer: a VQGAN whose latent is a sum of token maps from 1 x 1 to the full grid (arXiv
2404.02905).

Tokens are a pyramid of scales with one codebook; a prefix of scales decodes to a coarse preview.
Different from the official repository, which never released its training: it trains here with the
house's tokenizer module.
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.cnn import Decoder, Encoder, Sizes, SpatialAttention
from tessellar.protocol.in_loop import ScaleInputs
from tessellar.protocol.layout import Layout
from tessellar.tokenizers.parts.vqgan import VQGAN
from tessellar.tokenizers.var.quantizer import MultiScaleQuantizer


class VARVQVAE(VQGAN, ScaleInputs):
    """Square images whose grid of latents is the finest scale of `quantizer`.

    `kernel` is that of the convolutions on both sides of it, an odd number. Raises UserError where
    image size, stride and scales disagree.

    The first scales alone decode too; a scale that is not complete is not looked at.
    """

    quantizer: MultiScaleQuantizer
    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        image_size: int = 256,
        channels: int = 160,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        kernel: int = 3,
    ) -> None:
        stride = 2 ** (len(multipliers) - 1)
        if quantizer.sides[-1] * stride != image_size:
            raise UserError(
                f"image_size {image_size} at stride {stride} has no grid of {quantizer.sides[-1]}, the finest scale"
            )
        super().__init__(image_size, stride)
        self.latent_dim = quantizer.dim
        first = quantizer.segments[0].length
        self.layout = Layout(quantizer.segments, min_prefix=first)
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, quantizer.dim, dropout)
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)
        self.quant_conv = nn.Conv2d(quantizer.dim, quantizer.dim, kernel, padding=kernel // 2)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, quantizer.dim, kernel, padding=kernel // 2)
        self.init_weights()

    def init_weights(self) -> None:
        """As vaex, by the same authors, whose attention has one layer for queries, keys and values.

        | weight                                       | distribution                                     |
        |----------------------------------------------|--------------------------------------------------|
        | convolutions                                 | Xavier normal of gain 0.5                        |
        | queries, keys, values (a layer each here)    | the same over the fused matrix                   |
        | codes                                        | U(-20 / V, 20 / V)                               |
        | biases                                       | 0                                                |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SpatialAttention):
                for layer in (module.q, module.k, module.v):
                    # Fan in + out: 4, not 2, times the width.
                    nn.init.xavier_normal_(layer.weight, gain=0.5 * 2**-0.5)
        codes = self.quantizer.codebook.weight
        nn.init.uniform_(codes, -20 / len(codes), 20 / len(codes))

    @torch.no_grad()
    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1 from the tokens [B, N] of the coarser ones, as
        VAR reads them.
        """
        return self.quantizer.next_inputs(tokens, count)


SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


def scales(image_size: int) -> tuple[int, ...]:
    """The published scales of images of that side; raises UserError for others."""
    if image_size not in SCALES:
        raise UserError(
            f"VAR's tokenizer is published for {', '.join(map(str, SCALES))} pixels, not {image_size}"
        )
    return SCALES[image_size]


def var_vqvae(image_size: int = 256, dropout: float = 0.0) -> VARVQVAE:
    """108,948,355 parameters; 680 tokens of 4,096 codes at 256 pixels, 2,240 at 512, 9,451 at
    1,024.
    """
    return VARVQVAE(MultiScaleQuantizer(4096, 32, scales(image_size)), image_size, dropout=dropout)
