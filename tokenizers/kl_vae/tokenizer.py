"""KL VAE: MAR's continuous tokenizer, an LDM autoencoder with 16 channels at stride 16 (arXiv
2406.11838, 2112.10752).

xAR, MAR and TokenBridge generate its latents. The encoder attends at its coarsest level, the
decoder in the middle only (LDM's own kl-f16 differs). Different from the official code: a trainer
exists (it has none), attention is placed by level instead of by a nominal resolution, and the
latent scale lives with the weights.
"""

from torch import Tensor

from tessellar.layers.cnn import Sizes
from tessellar.tokenizers.parts.vqgan import TamingVQGAN
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

# 1 / standard deviation of kl16.ckpt's sampled latents over ImageNet.
KL16_SCALE = 0.2325


class KLVAE(TamingVQGAN):
    """Images of `image_size` (one side, or height and width) to a grid of latents, `quantizer.dim`
    channels each.

    `encoder_attention` and `decoder_attention` are the levels with attention after each block (0
    the finest; None: the encoder's coarsest). Raises ValueError where the stride does not divide
    the image size.
    """

    quantizer: GaussianBottleneck

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
        shared = (channels, tuple(multipliers), num_res_blocks)
        super().__init__(
            quantizer,
            image_size,
            encoding=Sizes(*shared, quantizer.in_dim, dropout, groups),
            decoding=Sizes(*shared, quantizer.dim, dropout, groups),
            encoder_attention=encoder_attention,
            decoder_attention=decoder_attention,
            segment="latents",
        )

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, N, C] of the tokens, which a cache keeps."""
        return self.quantizer.law(self.latents(images))


def kl16(
    image_size: int | tuple[int, int] = 256,
    kl_weight: float = 1e-6 / 48,
    scale: float | None = None,
) -> KLVAE:
    """66,456,019 parameters; 16 x 16 latents of 16 channels at 256 pixels. LDM's KL weight of sums
    is 1e-6.
    """
    return KLVAE(GaussianBottleneck(16, kl_weight, scale), image_size)
