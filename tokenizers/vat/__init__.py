"""VAT: latents of an in-context transformer in a Gaussian space, quantized over scales of growing
token counts (arXiv 2412.02202).
"""

from tessellar.tokenizers.vat.quantizer import SequenceScales
from tessellar.tokenizers.vat.tokenizer import VAT, vat_b256

__all__ = ["VAT", "SequenceScales", "vat_b256"]
