"""AliTok: patches and a prefix as one sequence that a causal decoder can draw (arXiv 2506.05289)."""

from tessellar.tokenizers.alitok.tokenizer import AliTok, alitok_256

__all__ = ["AliTok", "alitok_256"]
