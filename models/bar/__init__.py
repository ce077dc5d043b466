"""BAR: a causal transformer over tokens of bits, each of which a small head fills in by unmasking in
a few steps (arXiv 2602.09024).
"""

from tessellar.models.bar.head import MaskedBitHead, MaskedBits
from tessellar.models.bar.model import BAR, bar_b, bar_b_2, bar_b_4, bar_l, bar_l_512

__all__ = [
    "BAR",
    "MaskedBitHead",
    "MaskedBits",
    "bar_b",
    "bar_b_2",
    "bar_b_4",
    "bar_l",
    "bar_l_512",
]
