"""RecTok: continuous latents whose noisy versions give back the features of a vision model (arXiv
2512.13421).
"""

from tessellar.tokenizers.rectok.bottleneck import ChannelBottleneck
from tessellar.tokenizers.rectok.tokenizer import RecTok, rectok_b

__all__ = ["ChannelBottleneck", "RecTok", "rectok_b"]
