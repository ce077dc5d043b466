"""Which recorded systems can be replayed, and by what: functions say it themselves, nothing lists
them.

    @replays("mar", "gen_shared", "gen_train")
    def training(recording: Recording) -> dict[str, Tensor]: ...

A replay computes the outputs of some cases of a recording with our modules: it reads the official
config, the weights through an importer, and the inputs. It lies in `parity.py` of its paper's
package; the packages are looked through at the first question. Replays of decoding algorithms and
of training methods, which belong to no folder of a paper, lie in `tessellar/parity/decoding/` and
`tessellar/parity/training/`. Cases that are no aim of this project are named by `out_of_scope`, with
the reason: they are counted and told, not compared.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Recording

ReplayFunction = Callable[[Recording], dict[str, Tensor]]

PAPERS = ("tessellar.models", "tessellar.tokenizers")
METHODS = ("tessellar.parity.decoding", "tessellar.parity.training")
OWN = "tessellar.parity.own"  # of modules of this project's shape, whoever wrote them


@dataclass(frozen=True)
class Replay:
    """The cases that one function replays; `gen_*` stands for every case that begins so."""

    function: ReplayFunction
    cases: tuple[str, ...]

    def covers(self, case: str) -> bool:
        return any(fnmatchcase(case, pattern) for pattern in self.cases)

    def covers_any(self, cases: Iterable[str]) -> bool:
        return any(self.covers(case) for case in cases)


REGISTERED: dict[str, list[Replay]] = {}
"""What `replays` has seen so far, by system."""
OUT_OF_SCOPE: dict[str, dict[str, str]] = {}
"""Reasons by case, by system: what `out_of_scope` has seen so far."""


def out_of_scope(system: str, *cases: str, reason: str) -> None:
    """Name cases of recordings of `system` that are not replayed here, and why."""
    OUT_OF_SCOPE.setdefault(system, {}).update(dict.fromkeys(cases, reason))


def replays(
    system: str, *cases: str, gradients: bool = False
) -> Callable[[ReplayFunction], ReplayFunction]:
    """Registers the function below it as the replay of `cases` of recordings of `system`.

    It is run without autograd, unless some of its outputs are gradients.
    """

    def register(function: ReplayFunction) -> ReplayFunction:
        run = function if gradients else torch.no_grad()(function)
        REGISTERED.setdefault(system, []).append(Replay(run, cases))
        return run

    return register


def replays_of(system: str, packages: Sequence[str] = ()) -> list[Replay]:
    """Replays of a system, of our papers and of the named packages of others; none where it is
    unknown.

    Only those modules are imported whose text names the system.
    """
    for module, path in _modules(packages):
        if f'"{system}"' in path.read_text(encoding="utf-8"):
            importlib.import_module(module)
    return _of_packages(system, packages)


def systems(packages: Sequence[str] = ()) -> list[str]:
    """Names of all systems that can be replayed."""
    for module, _ in _modules(packages):
        importlib.import_module(module)
    return sorted(system for system in REGISTERED if _of_packages(system, packages))


def _of_packages(system: str, packages: Sequence[str]) -> list[Replay]:
    """Registered replays of a system, without those of packages that were only named in an earlier
    question.
    """
    roots = (OWN, *(f"{root}." for root in (*PAPERS, *METHODS, *packages)))
    found = REGISTERED.get(system, [])
    return [replay for replay in found if replay.function.__module__.startswith(roots)]


def _modules(packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Names and files of the modules in which replays lie: `parity.py` of a package or of a package
    inside it.
    """
    for root in (*PAPERS, *packages):
        for folder in _folders(root):
            if (folder / "parity.py").is_file():
                yield f"{root}.parity", folder / "parity.py"
            for path in sorted(folder.glob("*/parity.py")):
                yield f"{root}.{path.parent.name}.parity", path
    yield OWN, Path(__file__).with_name("own.py")
    for package in METHODS:
        for folder in _folders(package):
            for path in sorted(folder.glob("*.py")):
                yield f"{package}.{path.stem}", path


def _folders(package: str) -> list[Path]:
    try:
        return [Path(folder) for folder in importlib.import_module(package).__path__]
    except (ImportError, AttributeError) as error:
        raise UserError(f"{package!r} is no package that can be imported here ({error})") from error
