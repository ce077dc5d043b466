"""FlexTok's frozen VAE: Stable Diffusion's autoencoder with 16 channels at stride 8 (arXiv
2112.10752, 2403.03206).

The parts are those of `KLVAE`, with attention in the middle only. Weights come with an official
FlexTok checkpoint, an export of a KLVAE trained here, or diffusers' own file; without any the VAE
waits for a state dict.
"""

import torch

from tessellar.absent import stays_random
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck


def flextok_vae(
    channels: int = 16,
    image_size: int = 256,
    scale: float | None = None,
    weights: str | None = None,
    widths: tuple[int, ...] = (128, 256, 512, 512),
    num_res_blocks: int = 2,
    groups: int = 32,
) -> KLVAE:
    """83,653,863, 83,709,419 and 83,821,011 parameters with 4, 8 and 16 channels at the published
    widths.

    `weights`: a file of diffusers' AutoencoderKL or an export of ours of the same sizes. `scale`
    multiplies latents (None: the export's, else 1).
    """
    quantizer = GaussianBottleneck(channels, scale=scale)
    multipliers = tuple(width // widths[0] for width in widths)
    vae = KLVAE(
        quantizer,
        image_size,
        channels=widths[0],
        multipliers=multipliers,
        num_res_blocks=num_res_blocks,
        encoder_attention=(),
        decoder_attention=(),
        groups=groups,
    )
    on_meta = torch.get_default_device().type == "meta"
    if weights is not None and not on_meta and not stays_random(weights):
        from tessellar.tokenizers.flextok.official_vae import load_vae

        load_vae(vae, weights, scale)
    return vae.eval()
