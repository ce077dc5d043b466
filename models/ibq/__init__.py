"""IBQ's generator: a Llama whose blocks are modulated by the class (AdaLN) over IBQ's codes (arXiv
2412.02692).
"""

from tessellar.models.ibq.model import IBQAR, ibq_ar_b, ibq_ar_l, ibq_ar_xl, ibq_ar_xxl

__all__ = ["IBQAR", "ibq_ar_b", "ibq_ar_l", "ibq_ar_xl", "ibq_ar_xxl"]
