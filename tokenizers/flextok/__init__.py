"""FlexTok: an image as an ordered sequence of tokens, any prefix of which decodes (arXiv
2502.13967).
"""

from tessellar.tokenizers.flextok.flow_decoding import FlowDecoding, FlowTraining
from tessellar.tokenizers.flextok.tokenizer import (
    FlexTok,
    flextok_d12_d12,
    flextok_d18_d18,
    flextok_d18_d28,
)
from tessellar.tokenizers.flextok.transformer import TransformerSize
from tessellar.tokenizers.parts.latent_maps import Grid

__all__ = [
    "FlexTok",
    "FlowDecoding",
    "FlowTraining",
    "Grid",
    "TransformerSize",
    "flextok_d12_d12",
    "flextok_d18_d18",
    "flextok_d18_d28",
]
