"""TiTok: an image as a short sequence of latent tokens (arXiv 2406.07550; single stage: arXiv
2501.07730).
"""

from tessellar.tokenizers.titok.tokenizer import (
    TiTok,
    TokenDecoder,
    TokenEncoder,
    ViTSize,
    titok_b64,
    titok_bl64_vae_c16,
    titok_bl64_vq8k,
    titok_bl128_vae_c16,
    titok_bl128_vq8k,
    titok_l32,
    titok_ll32_vae_c16,
    titok_s128,
    titok_sl256_vq8k,
)

__all__ = [
    "TiTok",
    "TokenDecoder",
    "TokenEncoder",
    "ViTSize",
    "titok_b64",
    "titok_bl128_vae_c16",
    "titok_bl128_vq8k",
    "titok_bl64_vae_c16",
    "titok_bl64_vq8k",
    "titok_l32",
    "titok_ll32_vae_c16",
    "titok_s128",
    "titok_sl256_vq8k",
]
