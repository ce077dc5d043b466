"""Ming-UniVision's generator of images: reads semantic features of its tokenizer, predicts the next
latent with a flow head (arXiv 2510.06590).
"""

from tessellar.models.mingtok.model import MingTokAR, mingtok_ar_l

__all__ = ["MingTokAR", "mingtok_ar_l"]
