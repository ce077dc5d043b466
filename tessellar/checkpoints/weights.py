"""Weights into modules, strictly; what identifies the weights of a module."""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.tensor_files import _digest_tensors, listing


def load_strict(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state` into `module`; raises UserError that lists (shortened) what is missing, unknown or misshapen."""
    own = module.state_dict()
    problems = [
        listing("missing", own.keys() - state.keys()),
        listing("unknown", state.keys() - own.keys()),
        listing("of another shape", _misshapen(own, state)),
    ]
    if any(problems):
        raise UserError(f"{where} does not fit {type(module).__name__}: {'; '.join(p for p in problems if p)}")
    module.load_state_dict(dict(state), strict=True)


def _misshapen(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, shapes and values of all tensors; independent of any file."""
    digest = hashlib.sha256()
    _digest_tensors(digest, module.state_dict())
    return digest.hexdigest()[:16]
