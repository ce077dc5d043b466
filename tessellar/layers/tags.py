"""Tags on parameters: modules say what a parameter is, optimizers make their groups from that and
never match names.

Known tags: `hidden` (matrix inside a block, what Muon updates), `no_decay` (never weight-decayed
although a matrix), `decay` (weight-decayed although a vector or scalar), `encoder` (of a pretrained
encoder that is trained on, at a rate of its own), `written` (forward passes of training write into
it).
"""

from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


def tag(parameter: T, *names: str) -> T:
    """Add tags to a parameter and return it.

    Raises TypeError for any other tensor: `nn.Parameter(tensor)` is a new one, so the tags would be
    lost in silence.
    """
    _require_parameter(parameter)
    parameter.tags = tags(parameter) | set(names)  # type: ignore[attr-defined]
    return parameter


def untag(parameter: T, *names: str) -> T:
    """Take tags off a parameter and return it; for a system that treats a shared part in another
    way.
    """
    _require_parameter(parameter)
    parameter.tags = tags(parameter) - set(names)  # type: ignore[attr-defined]
    return parameter


def tags(parameter: Tensor) -> set[str]:
    """The tags of a parameter; empty where none were given."""
    return getattr(parameter, "tags", set())


def _require_parameter(parameter: Tensor) -> None:
    if not isinstance(parameter, nn.Parameter):
        kind = type(parameter).__name__
        raise TypeError(
            f"tags belong on an nn.Parameter, not on a {kind}: write tag(nn.Parameter(...), ...)"
        )
