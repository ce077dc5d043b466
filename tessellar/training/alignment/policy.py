"""Policy gradients over tokens: what VA-pi and GRPO share, as functions of tensors.

Shapes: B images, G samples of each, N tokens; R = B x G rows, of which b G .. b G + G - 1 belong to
image b.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.distribution import Distribution, Logits


def group_advantages(rewards: Tensor, group: int, eps: float = 1e-8, scale: bool = True) -> Tensor:
    """Rewards [R] against the others of their group: (r - mean) / (unbiased std + eps), or without
    `scale` r - mean (Dr. GRPO). Exactly 0 in a group of equal rewards.
    """
    grouped = rewards.view(-1, group)
    # Equal rewards become exact zeros, whose mean has no rounding error to be divided by.
    grouped = grouped - grouped[:, :1]
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(1, keepdim=True) + eps)
    return centred.flatten()


class Surrogate(NamedTuple):
    """Loss and ratio of each token, [R, N]."""

    loss: Tensor
    ratio: Tensor


def clipped_surrogate(new: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Surrogate:
    """PPO's clipped loss (arXiv 1707.06347, equation 7) of log-probabilities [R, N] with the
    advantage [R] of each sample.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantages = advantages[:, None]
    return Surrogate(torch.maximum(-advantages * ratio, -advantages * clipped), ratio)


def k3(reference: Tensor, new: Tensor) -> Tensor:
    """Schulman's estimate of KL(new || reference) from log-probabilities of what `new` drew: never
    below 0, of the right mean.
    """
    difference = reference - new
    return difference.exp() - difference - 1


def tempered(scores: Distribution, temperature: float) -> Distribution:
    """The distribution at a temperature; raises UserError for one that has no single logits and a
    temperature that is not 1.
    """
    if temperature == 1:
        return scores
    if not isinstance(scores, Logits):
        raise UserError(
            f"a policy of {type(scores).__name__} has a temperature of 1, not {temperature}"
        )
    return Logits(scores.logits / temperature)


def log_probs(scores: Distribution, tokens: Tensor) -> Tensor:
    """Log-probability [B, N] of each of tokens [B, N, ...]; raises UserError where there is none."""
    found = scores.log_prob(tokens)
    if found is None:
        raise UserError(f"{type(scores).__name__} has no likelihood to train a policy by")
    return found


def log_probs_of_groups(scores: Distribution, samples: Tensor) -> Tensor:
    """Log-probabilities [R, N] of `samples` [B, G, N, ...] under scores of B images."""
    each = [log_probs(scores, tokens) for tokens in samples.unbind(1)]
    return torch.stack(each, dim=1).flatten(0, 1)


@torch.no_grad()
def policy_facts(
    rewards: Tensor, surrogate: Surrogate, group: int, clip_range: float
) -> dict[str, Tensor]:
    """What is logged of an update: rewards, the share of groups without any difference, ratios."""
    grouped = rewards.view(-1, group)
    outside = (surrogate.ratio - 1).abs() > clip_range
    return {
        "reward": rewards.mean(),
        "reward_std": grouped.std(1).mean(),
        "equal_groups": (grouped == grouped[:, :1]).all(1).float().mean(),
        "ratio_off": (surrogate.ratio - 1).abs().max(),
        "clipped": outside.float().mean(),
    }
