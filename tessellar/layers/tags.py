"""Tags on parameters: modules say what a parameter is, optimizers make their groups from that and never match names.

Known tags: `hidden` (matrix inside a block, what Muon updates), `no_decay` (never weight-decayed although a matrix).
"""

from typing import TypeVar

from torch import Tensor

T = TypeVar("T", bound=Tensor)


def tag(parameter: T, *names: str) -> T:
    """Add tags to a parameter and return it."""
    parameter.tags = tags(parameter) | set(names)  # type: ignore[attr-defined]
    return parameter


def tags(parameter: Tensor) -> set[str]:
    """The tags of a parameter; empty where none were given."""
    return getattr(parameter, "tags", set())
