"""Drawing under teacher forcing: every token given the true ones before it, in one pass (VA-pi,
arXiv 2512.19680).
"""

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling
from tessellar.training.random_state import new_seeds


@torch.no_grad()
def drawn_groups(scores: Distribution, choice: Choice, group: int, like: Tensor) -> Tensor:
    """`group` independent draws [B, G, N, ...] of every token; `like` [B, N, ...] is of the same
    images.
    """
    noise = Noise(new_seeds(len(like)), like.device)
    settings = Sampling(choice=choice)
    return torch.stack([scores.sample(settings, noise) for _ in range(group)], dim=1)


def require_group(size: int) -> None:
    """Raise UserError for a group without others to be compared with."""
    if size < 2:
        raise UserError(
            f"group_size is {size}: an advantage is against the others of a group, give at least 2"
        )


def require_warm(choice: Choice) -> None:
    """Raise UserError for a greedy choice, which explores nothing."""
    if choice.temperature == 0:
        raise UserError("choice.temperature is 0: a greedy policy draws the same image each time")
