"""ViT-VQ: patch transformers around a vector quantizer (ViT-VQGAN, arXiv 2110.04627), the
CPU-friendly tokenizer.
"""

from tessellar.tokenizers.vit_vq.tokenizer import ViTVQ

__all__ = ["ViTVQ"]
