"""Modules built from what a file says, no larger than what the file holds.

A config of a few bytes can ask for a network of terabytes. So a module is first built on the meta
device, where tensors have shapes and no memory, its tensors are compared with those of the file,
and only then is it built with memory. Both times the tensors are counted as they are registered,
and building stops far above what the file holds: a network of a billion layers has no shapes to
compare before it is complete.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from tessellar.checkpoints.weights import check_fits, load_strict
from tessellar.errors import UserError

M = TypeVar("M", bound=nn.Module)

# Constructors make more than stays: classifiers that are cut off, tables that are no part of a state.
SLACK = 4
FREE_VALUES = 1 << 27
FREE_PARTS = 50_000


class TooLarge(UserError):
    """A config asks for far more than its file holds."""


class _Bounds:
    """How many values and parts may still be registered."""

    def __init__(self, state: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        tensors = filter(torch.is_tensor, state.values())
        self.values = FREE_VALUES + SLACK * sum(map(torch.numel, tensors))
        self.parts = FREE_PARTS + SLACK * len(state)

    def take(self, tensor: Any = None) -> None:
        self.parts -= 1
        self.values -= tensor.numel() if isinstance(tensor, Tensor) else 0
        if self.parts < 0 or self.values < 0:
            raise TooLarge(
                f"{self.where} cannot be built from its config: it asks for far more than the file holds"
            )


_bounds: ContextVar[_Bounds | None] = ContextVar("_bounds", default=None)


def _count(module: nn.Module, name: str, registered: Any) -> None:
    bounds = _bounds.get()
    if bounds is not None:
        bounds.take(registered)


@contextmanager
def bounded(state: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Raise UserError where modules that are made inside ask for far more than `state` holds."""
    hooks = [
        register_module_parameter_registration_hook(_count),
        register_module_buffer_registration_hook(_count),
        register_module_module_registration_hook(_count),
    ]
    token = _bounds.set(_Bounds(state, where))
    try:
        yield
    finally:
        _bounds.reset(token)
        for hook in hooks:
            hook.remove()


def build_filled(make: Callable[[], M], state: Mapping[str, Tensor], what: str, where: str) -> M:
    """`make()` with the tensors `state` in it; raises UserError where they do not fit, before memory
    is taken for them.

    `what` names the module, `where` its tensors, in messages.
    """
    with bounded(state, what), _NoInitialisation():
        with torch.device("meta"):
            probe = _made_without_memory(make)
        if probe is not None:
            check_fits(probe, state, where)
        module = make()
    load_strict(module, state, where)
    return module


def _made_without_memory(make: Callable[[], M]) -> M | None:
    """None where that fails: the reason, if it is one, shows when the module is made with memory."""
    try:
        return make()
    except TooLarge:
        raise
    except Exception:
        return None


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as allocated: `load_strict` fills each of them, and drawing billions of
    values is slow.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
