"""Tags on parameters: modules say what a parameter is, optimizers make their groups from that and never match names.

Known tags: `hidden` (matrix inside a block, what Muon updates), `no_decay` (never weight-decayed although a matrix).
"""

from torch import nn


def tag(parameter: nn.Parameter, *names: str) -> nn.Parameter:
    """Add tags to a parameter and return it."""
    parameter.tags = tags(parameter) | set(names)  # type: ignore[attr-defined]
    return parameter


def tags(parameter: nn.Parameter) -> set[str]:
    """The tags of a parameter; empty where none were given."""
    return getattr(parameter, "tags", set())
