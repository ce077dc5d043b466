"""ResTok: tokens in levels from coarse to fine, from a transformer with hierarchical residuals
(arXiv 2601.03955).
"""

from tessellar.tokenizers.restok.tokenizer import ResTok, restok_l_128

__all__ = ["ResTok", "restok_l_128"]
