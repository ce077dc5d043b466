"""LlamaGen's image tokenizer: taming's VQGAN with a small, l2-normalised codebook (arXiv
2406.06525, section 2.1).
"""

from tessellar.tokenizers.llamagen.tokenizer import LlamaGenVQ, vq_8, vq_16

__all__ = ["LlamaGenVQ", "vq_16", "vq_8"]
