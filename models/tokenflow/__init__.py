"""TokenFlow's generator: next-scale prediction behind a text or a class, with scales that may be drawn
again (arXiv 2412.03069).
"""

from tessellar.models.tokenflow.model import TokenFlowAR, tokenflow_7b

__all__ = ["TokenFlowAR", "tokenflow_7b"]
