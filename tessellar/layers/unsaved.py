"""A module that moves with the one that holds it, but is no part of it: not in its parameters, state
dict, config or export. For frozen networks that only a loss or a reward reads.
"""

from typing import Any, Generic, Self, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Unsaved(nn.Module, Generic[M]):
    """Holds `module`, frozen and in eval mode."""

    def __init__(self, module: M) -> None:
        super().__init__()
        # A tuple hides it from the parameters and the state dict.
        self._held = (module.eval().requires_grad_(False),)

    @property
    def module(self) -> M:
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *given: Any) -> Any:
        return self.module(*given)
