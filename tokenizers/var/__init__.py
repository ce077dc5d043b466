"""VAR's tokenizer: a VQGAN whose latent is a sum of token maps from 1 x 1 to the full grid (arXiv
2404.02905).
"""

from tessellar.tokenizers.var.quantizer import MultiScaleQuantizer, Phi
from tessellar.tokenizers.var.tokenizer import VARVQVAE, var_vqvae

__all__ = ["MultiScaleQuantizer", "Phi", "VARVQVAE", "var_vqvae"]
