"""Siblings: several drafts of the first place of a window, where the last rejection was (SJD-PAC's
tree of depth 1, arXiv 2603.18599).

Each is judged in turn by what is left of p, by the law that it was drawn from: the first by q, the
next by q without it, and so on (recursive rejection sampling without replacement, arXiv 2402.14160).
Exact. The drafts behind it were drawn without it, so they are judged in the branch of the one that
stays. One-hot laws have no siblings.

Shapes: B images, K siblings, V codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.protocol.choice import race
from tessellar.sampling.acceptance import mass


def further_drafts(
    law: Tensor, draft: Tensor, count: int, exponential: Tensor
) -> tuple[Tensor, Tensor]:
    """Drafts [B, K] of `law` [B, V] without replacement, `draft` [B] first, and which of them are
    there; `exponential` [B, V] is noise.
    """
    # The K - 1 first of a race are K - 1 draws without replacement.
    left = law.scatter(-1, draft[:, None], 0.0) / exponential
    others = left.topk(min(count - 1, left.shape[-1]), -1)
    drafts = torch.cat([draft[:, None], others.indices], -1)
    there = torch.cat([mass(law, draft)[:, None] > 0, others.values > 0], -1)
    return drafts, there


class Chosen(NamedTuple):
    """Of each image: which sibling stays, whether one does, and the token of the place."""

    branch: Tensor
    accepted: Tensor
    token: Tensor


def judge_siblings(
    p: Tensor, law: Tensor, drafts: Tensor, there: Tensor, uniform: Tensor, exponential: Tensor
) -> Chosen:
    """Judge siblings [B, K] of `law` [B, V] by `p` [B, V], with `uniform` [B, K]; where none stays the
    token is drawn from what is left of p, with `exponential` [B, V].
    """
    left = law.clone()
    wanted = p
    branch = torch.zeros_like(drafts[:, 0])
    accepted = torch.zeros_like(there[:, 0])
    for number in range(drafts.shape[1]):
        draft = drafts[:, number]
        q = left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
        residual = (wanted - q).clamp(min=0)
        total = residual.sum(-1)
        drawn = mass(q, draft)
        stays = uniform[:, number] * drawn < mass(wanted, draft)
        # p = q: nothing to draw from.
        stays = (stays | (total == 0)) & (drawn > 0) & there[:, number] & ~accepted
        branch = torch.where(stays, number, branch)
        accepted = accepted | stays
        # What was tried and did not stay leaves its mark, on p and on the law of the next.
        tried = there[:, number] & ~accepted
        wanted = torch.where(tried[:, None], residual / total[:, None], wanted)
        left = left.scatter(-1, draft[:, None], 0.0)
    rows = torch.arange(len(drafts), device=drafts.device)
    token = torch.where(accepted, drafts[rows, branch], race(wanted, exponential))
    return Chosen(branch, accepted, token)
