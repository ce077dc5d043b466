"""AliTok's generator: a next-token Llama over a prefix and the patches of an image (arXiv
2506.05289).
"""

from tessellar.models.alitok.model import AliTokAR, alitok_b, alitok_l, alitok_xl

__all__ = ["AliTokAR", "alitok_b", "alitok_l", "alitok_xl"]
