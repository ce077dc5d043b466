"""TokenFlow: one index into a semantic and a pixel codebook at every position, in scales (arXiv
2412.03069).
"""

from tessellar.tokenizers.tokenflow.quantizer import SharedQuantizer
from tessellar.tokenizers.tokenflow.semantic import (
    SemanticDecoderSize,
    SemanticVision,
    semantic_teacher,
)
from tessellar.tokenizers.tokenflow.tokenizer import (
    TokenFlow,
    tokenflow_b,
    tokenflow_b_256,
    tokenflow_l,
    tokenflow_xl,
)

__all__ = [
    "SemanticDecoderSize",
    "SemanticVision",
    "SharedQuantizer",
    "TokenFlow",
    "semantic_teacher",
    "tokenflow_b",
    "tokenflow_b_256",
    "tokenflow_l",
    "tokenflow_xl",
]
