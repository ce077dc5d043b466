"""MingTok: continuous latents that a causal decoder expands into semantic features, which generators
read (Ming-UniVision, arXiv 2510.06590).
"""

from tessellar.tokenizers.mingtok.tokenizer import MingTok, mingtok_512

__all__ = ["MingTok", "mingtok_512"]
