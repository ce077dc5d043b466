"""SEED: 32 causal tokens of meaning from a frozen vision transformer, and a decoder of its own behind
them (arXiv 2307.08041, 2310.01218).
"""

from tessellar.tokenizers.seed.detokenizer import Detokenizer, PixelDetokenizer, UnCLIP
from tessellar.tokenizers.seed.tokenizer import SEED, TextSide, seed_2
from tessellar.tokenizers.seed.vision import EvaVision, TimmVision

__all__ = [
    "SEED",
    "Detokenizer",
    "EvaVision",
    "PixelDetokenizer",
    "TextSide",
    "TimmVision",
    "UnCLIP",
    "seed_2",
]
