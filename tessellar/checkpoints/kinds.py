"""The two kinds of checkpoints, told apart without the libraries that read the second one: a file, or
a folder of several (sharded.py).
"""

from pathlib import Path
from typing import Any

import torch

REST = "rest.pt"  # all that is not a large tensor
METADATA = ".metadata"  # which part of which tensor lies where


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint of several files."""
    return (path / METADATA).is_file() and (path / REST).is_file()


def look_into(path: Path) -> Any:
    """The content of a checkpoint of either kind, for its plain data: tensors are mapped, or marks."""
    file = path / REST if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
