"""KL-16: the continuous autoencoder of LDM as MAR, xAR and TokenBridge use it (arXiv 2112.10752,
2406.11838).
"""

from tessellar.tokenizers.kl_vae.tokenizer import KLVAE, kl16

__all__ = ["KLVAE", "kl16"]
