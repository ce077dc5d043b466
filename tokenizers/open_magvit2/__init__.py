"""Open-MAGVIT2's tokenizer: a convolutional autoencoder whose codes are signs, 2^18 of them, as two
sub-tokens of 6 and 12 bits (arXiv 2409.04410).
"""

from tessellar.tokenizers.open_magvit2.tokenizer import (
    OpenMAGVIT2,
    open_magvit2_128,
    open_magvit2_256,
)

__all__ = ["OpenMAGVIT2", "open_magvit2_128", "open_magvit2_256"]
