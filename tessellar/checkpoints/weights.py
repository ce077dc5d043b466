"""Weights into modules, strictly; what identifies the weights of a module."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.configured import class_path
from tessellar.protocol.moved import TENSORS
from tessellar.tensor_files import _digest_tensors, listing


def with_current_names(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of `module`, of any version, under the names that its tensors have today
    (`protocol/moved.py`).

    What lies under the names may be anything: weights, averages, gradients.
    """
    names = current_names(module, list(state))
    return dict(zip(names, state.values(), strict=True))


def current_names(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of tensors of `module`, of any version, as they are today."""
    for former, new in _moved_tensors(module):
        names = [_replaced(name, former, new) for name in names]
    return list(names)


def first_names(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The first names that the tensors of today had: they never change."""
    for former, new in reversed(_moved_tensors(module)):
        names = [_replaced(name, new, former) for name in names]
    return list(names)


def _moved_tensors(module: nn.Module) -> list[tuple[str, str]]:
    """Former names of tensors or sub-modules within `module`, and those of today; outer modules
    first.
    """
    moved = []
    for prefix, part in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for kind in type(part).__mro__:  # sharding gives a module a class of its own
            for former, new in TENSORS.get(class_path(kind), {}).items():
                moved.append((start + former, start + new))
    return moved


def _replaced(name: str, former: str, new: str) -> str:
    """`name` with `new` in the place of `former`, where it is that or begins with it and a dot."""
    if name == former or name.startswith(f"{former}."):
        return new + name[len(former) :]
    return name


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    part = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = tensor
    return part


def load_strict(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state` into `module`; raises UserError that lists (shortened) what is missing, unknown
    or misshapen.
    """
    own = module.state_dict()
    state = with_current_names(module, state)
    # One message with everything that is wrong: weights of another size differ in many places.
    misshapen = []
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            misshapen.append(f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}")
    problems = [
        listing("missing", own.keys() - state.keys()),
        listing("unknown", state.keys() - own.keys()),
        listing("of another shape", misshapen),
    ]
    if any(problems):
        raise UserError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(p for p in problems if p)}"
        )
    module.load_state_dict(state, strict=True)


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, shapes and values of all tensors; independent of any
    file.
    """
    return digest_of(module.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 over names, shapes and values of tensors."""
    digest = hashlib.sha256()
    _digest_tensors(digest, tensors)
    return digest.hexdigest()[:16]
