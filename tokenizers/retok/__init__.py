"""ReToK: a flexible 1D tokenizer with redundant token padding and semantic regularisation (arXiv
2601.01535).
"""

from tessellar.tokenizers.retok.qformer import QFormerSize
from tessellar.tokenizers.retok.tokenizer import Inferred, ReToK, retok_s_b, retok_s_s

__all__ = ["Inferred", "QFormerSize", "ReToK", "retok_s_b", "retok_s_s"]
