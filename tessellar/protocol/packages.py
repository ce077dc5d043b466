"""Packages whose classes may be built and whose papers are found: this one, and those that a command names.

A paper is a folder with the modules of its kind: `tessellar/models/xar/official.py`. A package of the same shape
outside of this tree is found the same way once it is named (`--package mypackage`): the package itself is a paper, or
the folders in it are.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOTS = ("tessellar.tokenizers", "tessellar.models")


@dataclass(frozen=True)
class Room:
    """A module of a paper: the paper's name, and the path of the module, which is imported when it is asked for."""

    paper: str
    path: str

    def module(self) -> ModuleType:
        return importlib.import_module(self.path)


def rooms(name: str) -> Iterator[Room]:
    """The modules called `name` of all papers."""
    for root in ROOTS:
        yield from rooms_in(root, name)


def rooms_in(root: str, name: str) -> Iterator[Room]:
    """The modules called `name` of a package and of the packages in it, in the order of their names."""
    package = importlib.import_module(root)
    folders = [Path(folder) for folder in package.__path__]
    if _has(folders, name):
        yield Room(root.rpartition(".")[2], f"{root}.{name}")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if info.ispkg and _has([folder / info.name for folder in folders], name):
            yield Room(info.name, f"{root}.{info.name}.{name}")


def _has(folders: list[Path], name: str) -> bool:
    return any((folder / f"{name}.py").is_file() for folder in folders)
