"""LlamaGen: a plain Llama over the tokens of a grid, behind a class or caption prefix (arXiv
2406.06525).
"""

from tessellar.models.llamagen.model import (
    LlamaGen,
    llamagen_3b,
    llamagen_b,
    llamagen_l,
    llamagen_t2i_xl,
    llamagen_xl,
    llamagen_xxl,
)

__all__ = [
    "LlamaGen",
    "llamagen_3b",
    "llamagen_b",
    "llamagen_l",
    "llamagen_t2i_xl",
    "llamagen_xl",
    "llamagen_xxl",
]
