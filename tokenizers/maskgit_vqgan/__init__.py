"""MaskGIT-VQGAN: the convolutional tokenizer whose codes RAR generates (arXiv 2202.04200)."""

from tessellar.tokenizers.maskgit_vqgan.tokenizer import (
    MaskGITVQGAN,
    PixelDecoder,
    ProxyCodes,
    maskgit_vqgan,
    proxy_codes,
)

__all__ = ["MaskGITVQGAN", "PixelDecoder", "ProxyCodes", "maskgit_vqgan", "proxy_codes"]
