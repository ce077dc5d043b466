"""Couplings: what becomes of the drafts behind the first rejection of a window; and the
verification of a window.

Before the rejection drafts stay, at the rejection a token is drawn from the residual (p - q)+.
Behind it every slot gets a token y ~ p and the stored law q := p, so the next pass judges it
fairly. How y depends on the old draft is free:

| coupling   | y                                                                                  | exact |
|------------|------------------------------------------------------------------------------------|-------|
| `none`     | a fresh sample of p (SJD, arXiv 2410.01699)                                        | yes   |
| `maximal`  | the draft with probability min(1, p / q), else a sample of the residual (SCD,       | yes   |
|            | arXiv 2510.24211; adaptive continuation of SJD-PAC, arXiv 2603.18599)              |       |
| `gumbel`   | argmax of log p + Gumbel noise that stays with its token until that is committed   | yes   |
| `reuse`    | the draft where p / q exceeds a threshold, else a fresh sample (SJD++, 2512.07503)  | no    |

Different from SCD's released code: that keeps the old q for drafts that it retains, which biases
the samples. Shapes: B images, W slots of a window, s tokens an entity, V codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.protocol.choice import race
from tessellar.sampling.acceptance import Acceptance, mass


class Judged(NamedTuple):
    """A window after the acceptance tests: laws p, q and exponential noise [B, W, s, V]; draft,
    kept [B, W, s].
    """

    p: Tensor
    q: Tensor  # zero where a slot has no draft
    draft: Tensor
    kept: Tensor
    residual: Tensor  # (p - q)+, not normalised
    exponential: Tensor
    tied: Tensor | None  # exponential noise that stays with its token, for the Gumbel coupling


Coupling = Callable[[Judged], tuple[Tensor, Tensor]]
"""A judged window to tokens [B, W, s] for the slots behind the first rejection, and the law [B, W, s, V] of each."""


def fresh(window: Judged) -> tuple[Tensor, Tensor]:
    """Independent samples of p."""
    return race(window.p, window.exponential), window.p


def maximal(window: Judged) -> tuple[Tensor, Tensor]:
    """The maximal coupling of q and p: keep an accepted draft, else draw from the residual."""
    redrawn = race(window.residual, window.exponential)
    return torch.where(window.kept, window.draft, redrawn), window.p


def gumbel(window: Judged) -> tuple[Tensor, Tensor]:
    """Samples of p driven by noise that does not change between passes."""
    assert window.tied is not None
    return race(window.p, window.tied), window.p


@dataclass(frozen=True)
class Reuse:
    """SJD++: keep the draft where p / q exceeds `threshold`. Approximate: what is kept is no sample
    of p.
    """

    threshold: float = 0.5

    def __call__(self, window: Judged) -> tuple[Tensor, Tensor]:
        confident = mass(window.p, window.draft) > self.threshold * mass(window.q, window.draft)
        keep = confident & (mass(window.q, window.draft) > 0)
        return torch.where(keep, window.draft, race(window.p, window.exponential)), window.p


COUPLINGS: dict[str, Coupling] = {"none": fresh, "maximal": maximal, "gumbel": gumbel}


class Verdict(NamedTuple):
    """Tokens [B, W, s] of all slots and their laws [B, W, s, V]; `accepted` [B] entities stand
    before the rejection.
    """

    tokens: Tensor
    law: Tensor
    accepted: Tensor


def verify(
    p: Tensor,
    q: Tensor,
    draft: Tensor,
    uniform: Tensor,
    exponential: Tensor,
    acceptance: Acceptance,
    coupling: Coupling,
    tied: Tensor | None = None,
) -> Verdict:
    """Judge drafts [B, W, s] of law q by p [B, W, s, V], with `uniform` [B, W, s] and `exponential`
    [B, W, s, V].

    An entity is kept iff all its tokens are. In the first entity that is not, rejected tokens are
    redrawn from the residual; if every entity is kept, `accepted` is W. A slot without a draft has
    q = 0: it is never kept and its residual is p, so it gives a fresh sample.
    """
    #            before         at the rejection        behind it
    #   slot     0 .. a - 1     a                       a + 1 .. W - 1
    #   token    the draft      of (p - q)+, or draft   as the coupling says
    #
    # a = `accepted`; within entity a only the rejected tokens are redrawn.
    residual = (p - q).clamp_(min=0)
    kept = uniform < acceptance(p, q, draft)
    # p = q: nothing to redraw from.
    kept |= (residual.amax(-1) == 0) & (mass(q, draft) > 0)
    whole = kept.all(-1)
    accepted = torch.where(whole.all(-1), p.shape[1], (~whole).to(torch.int8).argmax(-1))
    slot = torch.arange(p.shape[1], device=p.device)[None, :, None]
    before = slot < accepted[:, None, None]
    at = slot == accepted[:, None, None]
    behind, law = coupling(
        Judged(p, q, draft=draft, kept=kept, residual=residual, exponential=exponential, tied=tied)
    )
    # a = W where everything was kept: a gather needs a slot that is there; `at` is empty then.
    rows = torch.arange(len(p), device=p.device)
    first = accepted.clamp(max=p.shape[1] - 1)
    redrawn = torch.where(
        kept[rows, first], draft[rows, first], race(residual[rows, first], exponential[rows, first])
    )
    tokens = torch.where(before, draft, torch.where(at, redrawn[:, None], behind))
    return Verdict(tokens, law, accepted)
