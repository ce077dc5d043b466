"""CCA: condition contrastive alignment (arXiv 2410.09347): guidance learnt into a class-conditional
generator from real images alone, without roll-outs.

Each image's tokens are scored under their own condition and under another image's, against a frozen
copy of the generator: the first is to become likelier, the second less likely. At the optimum the
policy is the reference times a power of p(tokens | condition) / p(tokens), which is what guidance
approximates in sampling.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.models.parts.prefix_transformer import generated
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import AMOUNTS, POSITIVE, in_ranges
from tessellar.protocol.condition import Condition, cat
from tessellar.protocol.generator import Generator
from tessellar.training.alignment.method import (
    AlignmentMethod,
    Batch,
    Terms,
    in_mode,
    score,
)
from tessellar.training.alignment.policy import log_probs


def contrastive_loss(
    own: Tensor, other: Tensor, positive: Tensor, beta: float, lam: float
) -> Tensor:
    """[B] of log-probabilities against the reference under the own and the other condition, [B]
    each (equation 11).

    Where `positive` [B] the other condition is no wrong one, and its term counts 1, for it.
    """
    against = -lam * F.logsigmoid(-beta * other)
    beside = -F.logsigmoid(beta * other)
    second = torch.where(positive, beside, against)
    return (second - F.logsigmoid(beta * own)) / max(lam, 1.0)


def equal_rows(a: Condition, b: Condition) -> Tensor:
    """Which of the rows [B] are the same condition."""
    same = torch.ones(a.batch, dtype=torch.bool)
    for ours, theirs in zip(a, b, strict=True):
        if ours is not None and theirs is not None:
            equal = (ours == theirs).flatten(1) if ours.ndim > 1 else (ours == theirs)[:, None]
            same = same.to(equal.device) & equal.all(1)
    return same


@in_ranges
class CCA(AlignmentMethod):
    """The other condition is that of the image before in the batch.

    With probability `null_share` both become the null condition, so that guidance stays usable. `lam`
    trades fidelity against diversity, as the scale of guidance does. `dropout` keeps that of both
    models on, as the released code.
    """

    ranges: ClassVar = {"beta": POSITIVE, "lam": AMOUNTS}

    def __init__(
        self, beta: float = 0.02, lam: float = 1000.0, null_share: float = 0.1, dropout: bool = True
    ) -> None:
        super().__init__()
        self.beta = beta
        self.lam = lam
        self.null_share = null_share
        self.dropout = dropout

    @property
    def needs_reference(self) -> bool:
        return True

    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        own, other, positive = self.pairs(model.generator, batch.condition)
        both = cat([own, other])
        tokens = torch.cat([batch.tokens, batch.tokens])
        assert self.reference is not None
        with torch.no_grad():
            before = self.log_likelihood(self.reference, tokens, both)
        difference = self.log_likelihood(model.generator, tokens, both) - before
        of_own, of_other = difference.chunk(2)
        each = contrastive_loss(of_own, of_other, positive, beta=self.beta, lam=self.lam)
        wrong = of_other[~positive]
        logged = {
            "own": of_own.mean(),
            "other": wrong.sum() / max(len(wrong), 1),
            "margin": (of_own - of_other)[~positive].sum() / max(len(wrong), 1),
        }
        return Terms({"contrastive": each.mean()}, logged)

    def pairs(
        self, generator: Generator, condition: Condition
    ) -> tuple[Condition, Condition, Tensor]:
        """Own and other condition of every row, and where the other is no wrong one."""
        rows = torch.arange(condition.batch).roll(1)
        other = condition.select(rows)
        null = generator.null(condition)
        device = next(tensor.device for tensor in condition if tensor is not None)
        kept = torch.rand(condition.batch, device=device) >= self.null_share
        own = condition.where(kept, null)
        other = other.where(kept, null)
        return own, other, equal_rows(own, other)

    def log_likelihood(self, generator: Generator, tokens: Tensor, condition: Condition) -> Tensor:
        """Of whole images [B], summed in float32."""
        with in_mode(generator, self.dropout):
            scores = score(generator, tokens, condition)
        return log_probs(scores, generated(tokens, generator.entities)).sum(1)
