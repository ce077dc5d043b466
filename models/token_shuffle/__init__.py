"""Token-Shuffle: the s x s codes of a window are one position of a causal Llama (arXiv 2504.17789)."""

from tessellar.models.token_shuffle.model import (
    TokenShuffle,
    token_shuffle_2b7,
    token_shuffle_2b7_first,
    token_shuffle_b,
    token_shuffle_l,
)

__all__ = [
    "TokenShuffle",
    "token_shuffle_2b7",
    "token_shuffle_2b7_first",
    "token_shuffle_b",
    "token_shuffle_l",
]
