"""LPD: locality-aware parallel decoding, a grid's tokens in few steps by position queries (arXiv
2507.01957).
"""

from tessellar.models.lpd.model import LPD, lpd_l, lpd_xl, lpd_xxl

__all__ = ["LPD", "lpd_l", "lpd_xl", "lpd_xxl"]
