"""Next-entity prediction: the tokens of an entity at once, by position queries as LPD's (arXiv
2507.01957).
"""

from tessellar.models.next_entity.model import NextEntity

__all__ = ["NextEntity"]
