"""Windows of tokens of several sub-tokens: judged sub-token by sub-token, each given those before it.

A token of a chain (`Chained`: two sub-tokens, sets of bits) is kept iff all its sub-tokens are. The
first one that is not is redrawn from the residual (p - q)+; those behind it in the token are fresh
samples: the law that their drafts had was that of another token. Exact where the acceptance is: this is the
speculative test of arXiv 2211.17192 on the sequence of sub-tokens. Behind the first token that is
not kept every token is coupled with its draft in the same way, sub-token by sub-token
(`couplings.py`), as long as it agrees with it.

Shapes: B images, W slots of a window (one token each), F sub-tokens, V codes (the largest
vocabulary).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.protocol.choice import Choice
from tessellar.protocol.distribution import Chained, with_values
from tessellar.sampling.acceptance import Acceptance, mass
from tessellar.sampling.couplings import Coupling, Judged, Verdict, maximal


@dataclass(frozen=True)
class Drafts:
    """Drafts [B, W, F] of laws q [B, W, F, V] (0: no draft), with the noise that judges them:
    uniform [B, W, F], exponential [B, W, F, V], and that of the Gumbel coupling.
    """

    tokens: Tensor
    law: Tensor
    uniform: Tensor
    exponential: Tensor
    tied: Tensor | None = None


@dataclass(frozen=True)
class Walked:
    """Tokens [B, W, F] that a walk through the stages chose, their laws p [B, W, F, V], and which
    drafts its tests kept.
    """

    tokens: Tensor
    law: Tensor
    kept: Tensor


def verify_chain(
    distribution: Chained,
    choice: Choice,
    drafts: Drafts,
    acceptances: Sequence[Acceptance],
    coupling: Coupling,
) -> Verdict:
    """Judge the drafts of a window by `distribution`; `acceptances` are those of each sub-token."""
    # Up to the first rejection, and in it: the draft where it is kept, else the residual, which is
    # the maximal coupling. Behind it `coupling` says.
    first = walk_drafts(distribution, choice, drafts, acceptances, maximal)
    whole = first.kept.all(-1)
    slots = whole.shape[1]
    accepted = torch.where(whole.all(-1), slots, (~whole).to(torch.int8).argmax(-1))
    behind = first
    if coupling is not maximal:
        behind = walk_drafts(distribution, choice, drafts, acceptances, coupling)
    slot = torch.arange(slots, device=whole.device)
    judged = (slot <= accepted[:, None])[..., None]
    tokens = torch.where(judged, first.tokens, behind.tokens)
    law = torch.where(judged[..., None], first.law, behind.law)
    return Verdict(tokens, law, accepted)


def walk_drafts(
    distribution: Chained,
    choice: Choice,
    drafts: Drafts,
    acceptances: Sequence[Acceptance],
    coupling: Coupling,
) -> Walked:
    """One walk through the stages, in which `coupling` chooses every sub-token."""
    walk = distribution.walk()
    codes = drafts.law.shape[-1]
    tokens = torch.zeros_like(drafts.tokens)
    law = torch.zeros_like(drafts.law)
    kept = torch.zeros_like(drafts.tokens, dtype=torch.bool)
    # Whether a token agrees with its draft so far; where it does not, the rest has no draft.
    agrees = torch.ones_like(kept[..., :1])
    for stage, members in enumerate(distribution.stages):
        of_stage = list(members)
        p = distribution.choice_at(choice, stage).probs(walk(tokens, stage))
        vocab = p.shape[-1]
        q = drafts.law[:, :, of_stage, :vocab] * agrees[..., None]
        draft = drafts.tokens[:, :, of_stage]
        residual = (p - q).clamp(min=0)
        chance = acceptances[members[0]](p, q, draft)
        stays = drafts.uniform[:, :, of_stage] < chance
        # p = q: nothing to redraw from.
        stays |= (residual.amax(-1) == 0) & (mass(q, draft) > 0)
        tied = None if drafts.tied is None else drafts.tied[:, :, of_stage, :vocab]
        exponential = drafts.exponential[:, :, of_stage, :vocab]
        chosen, own = coupling(
            Judged(
                p,
                q,
                draft=draft,
                kept=stays,
                residual=residual,
                exponential=exponential,
                tied=tied,
            )
        )
        tokens = with_values(tokens, members, chosen)
        law[:, :, of_stage] = F.pad(own, (0, codes - vocab))
        kept[:, :, of_stage] = stays
        agrees = agrees & (chosen == draft).all(-1, keepdim=True)
    return Walked(tokens, law, kept)
