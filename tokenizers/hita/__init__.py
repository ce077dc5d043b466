"""Hita: holistic tokens first, then a grid of patch tokens, each with a codebook of its own (arXiv
2507.02358).
"""

from tessellar.tokenizers.hita.tokenizer import Hita, hita_u, hita_v
from tessellar.tokenizers.hita.vision import HitaVision

__all__ = ["Hita", "HitaVision", "hita_u", "hita_v"]
