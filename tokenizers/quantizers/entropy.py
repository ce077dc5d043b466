"""Entropies of soft code assignments, the term that keeps codes in use (MaskGIT, arXiv 2202.04200;
MAGVIT-v2).

The sample entropy (mean over positions) is to be small, that of the mean assignment over the global
batch large. In nats. Published code guards the logarithm in three ways, which differ visibly for
many unused codes: `magvit` (MaskGIT, SEED-Voken, LlamaGen, UniTok), `clamp`
(vector-quantize-pytorch), `bsq` (BSQ-ViT).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar import distributed

MOST_BITS = 18  # of a group whose codes can be enumerated for every position
GUARDED_LOG: dict[str, Callable[[Tensor], Tensor]] = {
    "magvit": lambda p: (p + 1e-5).log(),
    "clamp": lambda p: p.clamp(min=1e-5).log(),
    "bsq": lambda p: (p + 1e-8).log(),
}


class Entropies(NamedTuple):
    """Mean entropy of the assignments, entropy of the mean assignment; one value a group."""

    sample: Tensor
    batch: Tensor

    def loss(self, diversity: float = 1.0) -> Tensor:
        """Mean over groups of sample - diversity * batch."""
        return (self.sample - diversity * self.batch).mean()


def check_guard(guard: str) -> str:
    """`guard`, or ValueError for one that is not known."""
    if guard not in GUARDED_LOG:
        raise ValueError(
            f"entropy guard {guard!r} is not known; there are {', '.join(GUARDED_LOG)}"
        )
    return guard


def entropy(probs: Tensor, guard: str) -> Tensor:
    """Entropy [...] of distributions [..., V]."""
    return -(probs * GUARDED_LOG[guard](probs)).sum(-1)


def entropies(logits: Tensor, guard: str = "magvit") -> Entropies:
    """Entropies [G] of logits [..., G, V]: each group has codes of its own."""
    rows = logits.flatten(0, -3)
    probs = rows.softmax(-1)
    sample = -(probs * rows.log_softmax(-1)).sum(-1) if guard == "magvit" else entropy(probs, guard)
    # The entropy of a mean is not the mean of entropies.
    mean = distributed.mean_over_ranks(probs.mean(0))
    return Entropies(sample.mean(0), entropy(mean, guard))


def entropy_loss(affinity: Tensor, temperature: float) -> Tensor:
    """Sample entropy minus batch entropy of one codebook; affinity [..., V]."""
    return entropies(affinity[..., None, :] / temperature).loss()


def all_signs(n: int, like: Tensor) -> Tensor:
    """All 2^n vectors of n signs, [2^n, n]."""
    # Bit i of an id is the sign of channel i.
    ids = torch.arange(2**n, device=like.device)[:, None]
    return (ids >> torch.arange(n, device=like.device) & 1).to(like.dtype) * 2 - 1
