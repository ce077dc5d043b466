"""Reading weight files safely, and putting them into modules strictly.

Two kinds of files are read: safetensors, and torch pickles with `weights_only=True` (official training checkpoints also
hold an `argparse.Namespace`, which is allowed by name). Anything else in a pickle is code, and is refused.
"""

import argparse
import hashlib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tessellar.errors import UserError

SHOWN = 5


class Weights(dict[str, Tensor]):
    """A state dict that answers a key it lacks with a UserError: it holds other weights than its reader expects."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__(tensors)
        self.where = where

    def __missing__(self, key: str) -> Tensor:
        raise UserError(f"{self.where} has no {key}: it holds other weights than are read here")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises UserError for a missing or damaged one."""
    require_file(path)
    try:
        with safe_open(str(path), "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({_one_line(error)})") from error


def read_pickle(path: Path) -> Any:
    """Content of a torch file; raises UserError for a missing or damaged one, and for one that holds code."""
    require_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} holds code ({code[1]}), not only tensors, so it was not opened") from error
        raise UserError(f"{path} is truncated or not a torch file ({_one_line(error)})") from error
    except Exception as error:  # bytes that are no pickle make the unpickler fail in any way, IndexError included
        raise UserError(f"{path} is truncated or not a torch file ({_one_line(error)})") from error


def require_file(path: Path) -> None:
    """Raise UserError unless `path` is a file."""
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")


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


def listing(what: str, names: Iterable[str], shown: int = SHOWN) -> str:
    """`3 missing: a, b, c`, sorted, at most `shown` names and the number of the rest; empty for no names."""
    names = sorted(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}: {', '.join(names[:shown])}{rest}" if names else ""


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, shapes and values of all tensors; independent of any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _one_line(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
