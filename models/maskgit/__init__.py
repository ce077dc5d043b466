"""MaskGIT over any categorical layout: all masked tokens predicted at once (arXiv 2202.04200),
TiTok's generators.
"""

from tessellar.models.maskgit.model import MaskGIT, maskgit_uvit, maskgit_vit

__all__ = ["MaskGIT", "maskgit_uvit", "maskgit_vit"]
