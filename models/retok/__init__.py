"""ReToK's generator: a LlamaGen over its tokens (arXiv 2601.01535)."""

from tessellar.models.retok.model import (
    ReToKGPT,
    retok_gpt_b,
    retok_gpt_l,
    retok_gpt_xl,
    retok_gpt_xxl,
)

__all__ = ["ReToKGPT", "retok_gpt_b", "retok_gpt_l", "retok_gpt_xl", "retok_gpt_xxl"]
