"""Scale pyramid: the latents of another tokenizer at several resolutions, coarse to fine (xAR's X = scale)."""

from tessellar.tokenizers.scale_pyramid.tokenizer import ScalePyramid

__all__ = ["ScalePyramid"]
