"""Gated feed-forward layers of transformer blocks whose official w1 is our w1 (the half under the
activation) above our w3 (BitDance, UniWeTok).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

PACKED = ".feed_forward.w1."
OTHER = ".feed_forward.w3."


def split_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each packed matrix as two."""
    split = {}
    for name, tensor in state.items():
        if PACKED in name:
            split[name], split[name.replace(PACKED, OTHER)] = tensor.chunk(2)
        else:
            split[name] = tensor
    return split


def join_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_gates`."""
    joined = {}
    for name, tensor in state.items():
        if PACKED in name:
            joined[name] = torch.cat([tensor, state[name.replace(PACKED, OTHER)]])
        elif OTHER not in name:
            joined[name] = tensor
    return joined
