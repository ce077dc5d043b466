"""BAR's tokenizer: a vision transformer whose tokens are bits, without a codebook, kept near the
features of SigLIP2 (arXiv 2602.09024).
"""

from tessellar.tokenizers.bar_fsq.tokenizer import BARFSQ, bar_fsq_256, bar_fsq_512

__all__ = ["BARFSQ", "bar_fsq_256", "bar_fsq_512"]
