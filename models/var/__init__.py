"""VAR: next-scale prediction; all tokens of a scale at once, from coarse to fine (arXiv
2404.02905).
"""

from tessellar.models.var.model import VAR, var_d16, var_d20, var_d24, var_d30, var_d36_s

__all__ = ["VAR", "var_d16", "var_d20", "var_d24", "var_d30", "var_d36_s"]
