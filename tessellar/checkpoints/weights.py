"""Weights into modules, strictly; what identifies the weights of a module."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
    """Copy `state` into `module`; raises UserError that lists (shortened) what is missing, unknown,
    misshapen, of another kind of numbers, or not finite.
    """
    check_fits(module, state, where)
    state = with_current_names(module, state)
    broken = []
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.float()  # torch has no such test of floats of one byte
        if not tensor.isfinite().all():
            broken.append(name)
    if broken:
        raise UserError(f"{where} holds NaN or infinite weights; {listing('of them', broken)}")
    module.load_state_dict(state, strict=True)


def check_fits(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError, as `load_strict` does, unless names, shapes and kinds of numbers are those of
    the module, which may be on the meta device.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{where} holds a {type(state).__name__}, not weights by their names")
    own = module.state_dict()
    state = with_current_names(module, state)
    foreign: list[str] = []
    misshapen: list[str] = []
    of_other_kind: list[str] = []  # copying would round, or drop the imaginary part, in silence
    for name in sorted(own.keys() & state.keys()):
        theirs = state[name]
        ours = own[name]
        dense = isinstance(theirs, Tensor) and theirs.layout is torch.strided
        if not dense or theirs.is_quantized or theirs.is_meta:
            foreign.append(name)
            continue
        if theirs.shape != ours.shape:
            misshapen.append(f"{name} {tuple(theirs.shape)} for {tuple(ours.shape)}")
        if _kind(theirs) != _kind(ours):
            of_other_kind.append(f"{name} {_kind(theirs)} for {_kind(ours)}")
    problems = [
        listing("missing", own.keys() - state.keys()),
        listing("unknown", state.keys() - own.keys()),
        listing("no plain tensors", foreign),
        listing("of another shape", misshapen),
        listing("of another kind of numbers", of_other_kind),
    ]
    if any(problems):
        raise UserError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}"
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "real"
    if tensor.is_complex():
        return "complex"
    return "true or false" if tensor.dtype == torch.bool else "integer"


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
