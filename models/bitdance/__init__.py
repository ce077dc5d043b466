"""BitDance: a Llama whose tokens of bits are drawn by a small diffusion head, one or a patch at a time
(arXiv 2602.14041).
"""

from tessellar.models.bitdance.head import BinaryHead
from tessellar.models.bitdance.model import (
    BitDance,
    bitdance_b_1x,
    bitdance_b_4x,
    bitdance_b_16x,
    bitdance_h_1x,
    bitdance_l_1x,
)

__all__ = [
    "BinaryHead",
    "BitDance",
    "bitdance_b_1x",
    "bitdance_b_4x",
    "bitdance_b_16x",
    "bitdance_h_1x",
    "bitdance_l_1x",
]
