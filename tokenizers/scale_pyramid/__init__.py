"""Scale pyramid: another tokenizer's latents at several resolutions, for xAR's scales (arXiv
2502.20388).
"""

from tessellar.tokenizers.scale_pyramid.tokenizer import ScalePyramid

__all__ = ["ScalePyramid"]
