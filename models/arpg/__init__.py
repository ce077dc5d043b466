"""ARPG: tokens in random orders, asked for by their places in a second stage of cross-attention
(arXiv 2503.10568).
"""

from tessellar.models.arpg.model import ARPG, arpg_l, arpg_sizes, arpg_xl, arpg_xxl

__all__ = ["ARPG", "arpg_l", "arpg_sizes", "arpg_xl", "arpg_xxl"]
