"""FLASH's drafter: several next tokens at once from the hidden states of a frozen generator (arXiv
2505.12728).
"""

from tessellar.models.flash.model import FlashDrafter

__all__ = ["FlashDrafter"]
