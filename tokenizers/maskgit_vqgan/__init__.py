"""MaskGIT-VQGAN: the convolutional tokenizer whose codes TiTok's first stage predicts and RAR generates."""

from tessellar.tokenizers.maskgit_vqgan.tokenizer import (
    MaskGITVQGAN,
    PixelDecoder,
    ProxyCodes,
    maskgit_vqgan,
    proxy_codes,
)

__all__ = ["MaskGITVQGAN", "PixelDecoder", "ProxyCodes", "maskgit_vqgan", "proxy_codes"]
