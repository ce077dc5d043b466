"""A recipe that was tuned on a small model, carried to a wider and deeper one (after muP, arXiv
2203.03466, for Adam; depth after arXiv 2310.02244).

With m = width / base width and d = depth / base depth:

| weight                                             | start    | Adam's rate     | decay         |
|----------------------------------------------------|----------|-----------------|---------------|
| matrices between hidden layers (tagged `hidden`)   | x m^-1/2 | x m^-1 d^-1/2   | x m d^1/2     |
| other linear layers that read the width (the head) | as made  | x m^-1          | x m           |
| embeddings, inputs, norms, biases                  | as made  | as given        | as given      |

So rate times decay, by which AdamW shrinks a weight, is the same everywhere. Different from muP:
attention keeps its 1 / sqrt(head size), since heads are of one size here, and a head that does not
start at 0 keeps its start. Different from the paper on depth: branches have no multiplier of their
own. Muon's rate of hidden matrices stays: its orthogonal steps are of one size at every width.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from tessellar.errors import UserError
from tessellar.layers.tags import tags
from tessellar.protocol.arguments import SIZES, in_ranges


class Shape(NamedTuple):
    """Channels of the hidden states, and the number of blocks of the longest stack."""

    width: int
    depth: int


@in_ranges
@dataclass(frozen=True)
class Transfer:
    """The width and depth at which a recipe was tuned; without a depth, rates do not depend on it.

    Raises UserError for a model without matrices between hidden layers.
    """

    ranges: ClassVar = {"base_width": SIZES, "base_depth": SIZES}

    base_width: int
    base_depth: int | None = None

    def rates(self, *modules: nn.Module) -> dict[int, float]:
        """Factors of Adam's rate by the identity of parameters; those that are missing have 1."""
        shape = shape_of(*modules)
        by_width = self.base_width / shape.width
        by_depth = 1.0 if self.base_depth is None else (self.base_depth / shape.depth) ** 0.5
        found: dict[int, float] = {}
        for module in nn.ModuleList(modules).modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 2 and "hidden" in tags(parameter):
                    found[id(parameter)] = by_width * by_depth
            reads_width = isinstance(module, nn.Linear) and module.in_features == shape.width
            if reads_width and id(module.weight) not in found:
                found[id(module.weight)] = by_width
        return found

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Scale the hidden matrices of a model that was just made."""
        factor = (self.base_width / shape_of(module).width) ** 0.5
        for parameter in module.parameters():
            if parameter.ndim == 2 and "hidden" in tags(parameter):
                parameter.mul_(factor)


def shape_of(*modules: nn.Module) -> Shape:
    """Width (what most hidden matrices read) and depth of models."""
    whole = nn.ModuleList(modules)
    read: Counter[int] = Counter()
    for parameter in whole.parameters():
        if parameter.ndim == 2 and "hidden" in tags(parameter):
            read[parameter.shape[1]] += 1
    if not read:
        raise UserError(
            "transfer follows the matrices between hidden layers, of which this model has none"
        )
    depth = 1
    for module in whole.modules():
        if isinstance(module, nn.ModuleList) and module is not whole:
            hidden = any("hidden" in tags(parameter) for parameter in module.parameters())
            depth = max(depth, len(module) if hidden else 1)
    return Shape(read.most_common(1)[0][0], depth)
