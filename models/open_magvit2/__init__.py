"""Open-MAGVIT2's generator: a Llama over tokens of two sub-tokens, which a small transformer inside
of each token predicts one after the other (arXiv 2409.04410).
"""

from tessellar.models.open_magvit2.model import (
    OpenMAGVIT2AR,
    open_magvit2_ar_b,
    open_magvit2_ar_l,
    open_magvit2_ar_xl,
)

__all__ = ["OpenMAGVIT2AR", "open_magvit2_ar_b", "open_magvit2_ar_l", "open_magvit2_ar_xl"]
