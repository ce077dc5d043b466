"""FlexAR: next-token generator over FlexTok's tokens, class- or text-conditional (arXiv
2502.13967).
"""

from tessellar.models.flextok.model import (
    FlexAR,
    flexar_1b_t2i,
    flexar_3b_t2i,
    flexar_113m_t2i,
    flexar_382m_t2i,
)

__all__ = ["FlexAR", "flexar_113m_t2i", "flexar_1b_t2i", "flexar_382m_t2i", "flexar_3b_t2i"]
