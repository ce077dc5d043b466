"""Semanticist's generator (epsilon-LlamaGen): next-token prediction of continuous slots with a flow
head (arXiv 2503.08685).
"""

from tessellar.models.semanticist.model import (
    SemanticistAR,
    semanticist_ar_b,
    semanticist_ar_l,
    semanticist_ar_xl,
)

__all__ = ["SemanticistAR", "semanticist_ar_b", "semanticist_ar_l", "semanticist_ar_xl"]
