"""Packages whose classes may be built and whose papers are found: this one, and those that a
command names.

A paper is a folder with the modules of its kind: `tessellar/models/xar/official.py`. A package of
the same shape outside of this tree is found the same way once it is named (`--package mypackage`,
`tessellar.load(trust=...)`): the package itself is a paper, or the folders in it are. Whoever names
a package lets its code run, as `import` does.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from tessellar.errors import UserError

OURS = "tessellar"
ROOTS = ("tessellar.tokenizers", "tessellar.models")

_trusted: ContextVar[tuple[str, ...]] = ContextVar("_trusted", default=())


def trusted() -> tuple[str, ...]:
    """Packages of others that were named."""
    return _trusted.get()


def trust(packages: str | Iterable[str]) -> None:
    """Import packages (a comma-separated text, or names) and trust their classes until the command
    ends.

    One that is not installed is looked for in the current folder. Raises UserError for what cannot
    be imported.
    """
    names = packages.split(",") if isinstance(packages, str) else list(packages)
    for name in [name.strip() for name in names if name.strip()]:
        _import(name)
        if name not in _trusted.get():
            _trusted.set((*_trusted.get(), name))


@contextmanager
def trusting(packages: str | Iterable[str] = ()) -> Iterator[None]:
    """Trust packages within; what is trusted within on top of them is forgotten at the end too."""
    token = _trusted.set(_trusted.get())
    try:
        trust(packages)
        yield
    finally:
        _trusted.reset(token)


def is_trusted(module: str) -> bool:
    """Whether a module, or a class path, is of this package or of a trusted one."""
    return any(
        module == package or module.startswith(f"{package}.") for package in (OURS, *trusted())
    )


def _import(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{name!r} is not the name of a package, such as mypackage")
    top = name.partition(".")[0]
    here = Path.cwd()
    is_here = (here / top).is_dir() or (here / f"{top}.py").is_file()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != top or not is_here or str(here) in sys.path:
            raise UserError(
                f"package {name!r} cannot be imported ({error}): install it, or name its folder in PYTHONPATH"
            ) from error
        sys.path.append(str(here))
        _import(name)


@dataclass(frozen=True)
class Room:
    """A module of a paper: the paper's name, its package, and the path of the module, imported when
    asked for.
    """

    paper: str
    package: str
    path: str

    def module(self) -> ModuleType:
        return importlib.import_module(self.path)


def rooms(name: str) -> Iterator[Room]:
    """The modules called `name` of all papers: ours, then those of trusted packages."""
    for root in (*ROOTS, *trusted()):
        yield from rooms_in(root, name)


def rooms_in(root: str, name: str) -> Iterator[Room]:
    """The modules called `name` of a package and of the packages in it, in the order of their
    names.
    """
    package = importlib.import_module(root)
    folders: list[str] = list(getattr(package, "__path__", ()))
    owner = root.partition(".")[0]
    if _has(folders, f"{name}.py"):
        yield Room(root.rpartition(".")[2], owner, f"{root}.{name}")
    for info in sorted(pkgutil.iter_modules(folders), key=attrgetter("name")):
        if info.ispkg and _has(folders, f"{info.name}/{name}.py"):
            yield Room(info.name, owner, f"{root}.{info.name}.{name}")


def _has(folders: list[str], file: str) -> bool:
    """A package may lie in several folders (PEP 420)."""
    return any((Path(folder) / file).is_file() for folder in folders)
