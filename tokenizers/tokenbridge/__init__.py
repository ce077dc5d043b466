"""TokenBridge's tokens: each channel of a continuous tokenizer quantised alone, after its training
(arXiv 2503.16430).
"""

from tessellar.tokenizers.tokenbridge.grid import ChannelGrid
from tessellar.tokenizers.tokenbridge.tokenizer import PostQuantized, tokenbridge_kl16

__all__ = ["ChannelGrid", "PostQuantized", "tokenbridge_kl16"]
