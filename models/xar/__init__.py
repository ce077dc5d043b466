"""xAR: next-X prediction of continuous tokens with flow matching and noisy context (arXiv
2502.20388, v2).
"""

from tessellar.models.xar.model import XAR, GatedGELU, xar_b, xar_h, xar_l

__all__ = ["GatedGELU", "XAR", "xar_b", "xar_h", "xar_l"]
