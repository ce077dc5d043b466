"""IBQ's tokenizer: taming's VQGAN with a large codebook, every code of which gets gradients (arXiv
2412.02692).
"""

from tessellar.tokenizers.ibq.tokenizer import (
    IBQVQGAN,
    ibq_1024,
    ibq_8192,
    ibq_16384,
    ibq_262144,
)

__all__ = ["IBQVQGAN", "ibq_1024", "ibq_16384", "ibq_262144", "ibq_8192"]
