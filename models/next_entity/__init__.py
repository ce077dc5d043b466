"""Next-entity prediction over a categorical layout: the tokens of an entity, whatever it is, at once, by queries."""

from tessellar.models.next_entity.model import NextEntity

__all__ = ["NextEntity"]
