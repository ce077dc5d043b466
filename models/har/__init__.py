"""HAR: ResTok's generator: a few tokens one by one, then a whole level a step (arXiv 2601.03955)."""

from tessellar.models.har.model import HAR, har_b, har_l, har_xl, har_xxl

__all__ = ["HAR", "har_b", "har_l", "har_xl", "har_xxl"]
