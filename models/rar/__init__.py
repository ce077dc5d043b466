"""RAR: next-token prediction over randomly permuted orders that anneal to raster order (arXiv
2411.00776).
"""

from tessellar.models.rar.model import RAR, rar_b, rar_l, rar_xl, rar_xxl

__all__ = ["RAR", "rar_b", "rar_l", "rar_xl", "rar_xxl"]
