"""UniWeTok: convolutions and attention around 128 signs a cell of 32 x 32 pixels (arXiv 2602.14178)."""

from tessellar.tokenizers.uniwetok.losses import BitPrior, Distillation
from tessellar.tokenizers.uniwetok.tokenizer import UniWeTok, uniwetok_128

__all__ = ["BitPrior", "Distillation", "UniWeTok", "uniwetok_128"]
