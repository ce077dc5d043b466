"""RandAR: next-token prediction in random orders, each token asked for by a position instruction
token (arXiv 2412.01827).
"""

from tessellar.models.randar.model import RandAR, randar_l, randar_sizes, randar_xl, randar_xxl

__all__ = ["RandAR", "randar_l", "randar_sizes", "randar_xl", "randar_xxl"]
