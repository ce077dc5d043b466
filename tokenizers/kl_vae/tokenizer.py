"""KL VAE: MAR's continuous tokenizer, an LDM autoencoder with 16 channels at stride 16 (arXiv
2406.11838, 2112.10752).

xAR, MAR and TokenBridge generate its latents. The encoder attends at its coarsest level, the
decoder in the middle only (LDM's own kl-f16 differs). Different from the official code: a trainer
exists (it has none), attention is placed by level instead of by a nominal resolution, and the
latent scale lives with the weights.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.layers.cnn import Decoder, Encoder, Sizes
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

KL16_SCALE = 0.2325  # 1 / standard deviation of kl16.ckpt's sampled latents over ImageNet


class KLVAE(Tokenizer):
    """Images of `image_size` (one side, or height and width) to a grid of latents, `quantizer.dim`
    channels each.

    `encoder_attention` and `decoder_attention` are the levels with attention after each block (0
    the finest; None: the encoder's coarsest). Raises ValueError where the stride does not divide
    the image size.
    """

    def __init__(
        self,
        quantizer: GaussianBottleneck,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        encoder_attention: tuple[int, ...] | None = None,
        decoder_attention: tuple[int, ...] = (),
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(multipliers) - 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.stride or width % self.stride:
            raise ValueError(f"the stride {self.stride} does not divide image_size {image_size}")
        self.image_size = (height, width)
        self.layout = grid_layout(
            height // self.stride, width // self.stride, quantizer.kind, "latents"
        )
        shared = (channels, tuple(multipliers), num_res_blocks)
        self.encoder = Encoder(Sizes(*shared, quantizer.in_dim, dropout, groups), encoder_attention)
        self.decoder = Decoder(Sizes(*shared, quantizer.dim, dropout, groups), decoder_attention)
        self.quant_conv = nn.Conv2d(quantizer.in_dim, quantizer.in_dim, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, quantizer.dim, 1)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def latents(self, images: Tensor) -> Tensor:
        """Moments [B, N, 2 C] of images: means, then log variances."""
        self.check_images(images)
        return rearrange(self.quant_conv(self.encoder(images)), "b c h w -> b (h w) c")

    def render(self, latents: Tensor) -> Tensor:
        """Images of unscaled latents [B, N, C]."""
        height = self.image_size[0] // self.stride
        latents = rearrange(
            latents.to(self.post_quant_conv.weight.dtype), "b (h w) c -> b c h w", h=height
        )
        return at_least_float32(self.decoder(self.post_quant_conv(latents.contiguous())))

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.quantizer.draw(self.latents(images), generator)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, N, C] of the tokens, which a cache keeps."""
        return self.quantizer.law(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.render(self.quantizer.decode(tokens))

    def forward(self, images: Tensor) -> TokenizerOutput:
        bottleneck = self.quantizer(self.latents(images))
        return TokenizerOutput(
            self.render(bottleneck.quantized), bottleneck.tokens, bottleneck.losses
        )


def kl16(
    image_size: int | tuple[int, int] = 256,
    kl_weight: float = 1e-6 / 48,
    scale: float | None = None,
) -> KLVAE:
    """66,456,019 parameters; 16 x 16 latents of 16 channels at 256 pixels. LDM's KL weight of sums
    is 1e-6.
    """
    return KLVAE(GaussianBottleneck(16, kl_weight, scale), image_size)
