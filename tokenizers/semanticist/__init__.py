"""Semanticist: continuous 1D tokens in order of explained variance, which a diffusion transformer
decodes (arXiv 2503.08685).
"""

from tessellar.tokenizers.semanticist.tokenizer import (
    Semanticist,
    SlotDecoding,
    SlotTraining,
    semanticist_l,
    semanticist_xl,
)

__all__ = ["Semanticist", "SlotDecoding", "SlotTraining", "semanticist_l", "semanticist_xl"]
