"""TokenBridge: masked autoregression over tokens of quantised channels, one channel after the other
by a small transformer (arXiv 2503.16430).
"""

from tessellar.models.tokenbridge.model import (
    TokenBridge,
    tokenbridge_b,
    tokenbridge_h,
    tokenbridge_l,
)
from tessellar.models.tokenbridge.order import KL16_ORDER, low_frequency_order

__all__ = [
    "KL16_ORDER",
    "TokenBridge",
    "low_frequency_order",
    "tokenbridge_b",
    "tokenbridge_h",
    "tokenbridge_l",
]
