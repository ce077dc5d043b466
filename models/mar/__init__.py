"""MAR: masked autoregression over continuous tokens with a diffusion loss per token (arXiv
2406.11838).
"""

from tessellar.models.mar.model import MAR, mar_b, mar_h, mar_l

__all__ = ["MAR", "mar_b", "mar_h", "mar_l"]
