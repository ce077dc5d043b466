"""Hita's generator: a Llama over holistic tokens, then patches, with a vocabulary for each (arXiv
2507.02358).
"""

from tessellar.models.hita.model import (
    HitaAR,
    hita_ar_2b,
    hita_ar_b,
    hita_ar_l,
    hita_ar_xl,
    hita_ar_xxl,
)

__all__ = ["HitaAR", "hita_ar_2b", "hita_ar_b", "hita_ar_l", "hita_ar_xl", "hita_ar_xxl"]
