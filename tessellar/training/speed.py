"""Speed and memory switches of a run: compiled blocks, recomputed activations, a loss in parts. All
leave results as they are, up to rounding.
"""

from collections.abc import Iterator

import torch
from torch import nn

from tessellar.errors import UserError


def compile_each_block(module: nn.Module) -> int:
    """`torch.compile` every member of the module's lists of blocks on its own (regional); returns
    their number.

    Members of one list share their code, so a deep model compiles about as fast as a shallow one.
    Raises UserError for a module without lists.
    """
    found = list(blocks(module))
    if not found:
        raise UserError(
            f"{type(module).__name__} has no repeated blocks to compile; leave compile_blocks off"
        )
    for block in found:
        block.compile()
    return len(found)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists (`nn.ModuleList`) inside a module."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def compile_layers_together(module: nn.Module) -> None:
    """`torch.compile` the pass through all layers of a generator as one graph without a break;
    raises UserError where it has no such pass.
    """
    through = getattr(module, "through_layers", None)
    if through is None:
        raise UserError(
            f"{type(module).__name__} has no pass through all layers to compile; leave compile_model off"
        )
    module.through_layers = torch.compile(through, fullgraph=True)  # type: ignore[assignment]


def checkpoint_activations(module: nn.Module, selective: bool = False) -> None:
    """Have a generator recompute its blocks' activations in the backward pass, with `selective` all
    but products of matrices and attention; raises UserError where it cannot.
    """
    if selective and not hasattr(module, "through_layers"):
        raise UserError(
            f"{type(module).__name__} recomputes all or nothing: checkpointing true or false"
        )
    if not hasattr(module, "activation_checkpointing"):
        raise UserError(
            f"{type(module).__name__} cannot recompute activations; leave checkpointing off"
        )
    module.activation_checkpointing = "selective" if selective else True  # type: ignore[assignment]


def chunk_the_loss(module: nn.Module) -> None:
    """Have a generator compute the training loss of 32,768 codes or more in parts, without a table
    of all logits; raises UserError where it cannot.
    """
    if getattr(module, "chunked_loss", None) is None:
        raise UserError(
            f"{type(module).__name__} has no loss that can be computed in parts; leave chunked_loss off"
        )
    module.chunked_loss = True  # type: ignore[assignment]
