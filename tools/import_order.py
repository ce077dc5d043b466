"""The order of packages as a contract: each imports only what stands before it. Prints what does not.

Links are followed (`tessellar/models` and `tessellar/tokenizers`), imports inside functions and under TYPE_CHECKING
count. Within one level, packages do not import each other. `*/parity.py` counts as part of parity, which stands above
the papers whose outputs it replays.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "tessellar"
ORDER = (
    (
        "errors",
        "distributed",
        "images",
        "npy",
        "plain_data",
        "randomness",
        "tensor_files",
        "places",
        "progress",
        "schedules",
    ),
    ("layers",),
    ("protocol",),
    ("text", "processes", "checkpoints"),
    ("interop",),
    ("networks",),
    ("models", "tokenizers"),
    ("sampling", "data"),
    ("pipeline",),
    ("measures",),
    ("training", "evaluation"),
    ("callbacks",),
    ("parity",),
    ("cli",),
)
# The files of the first level stand beside each other: they are the ground, and may use `errors`.
GROUND = ORDER[0]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Module name to file, for every Python file of the package, links followed."""
    found = {}
    for path in _files(root / PACKAGE):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from _files(path)
        elif path.suffix == ".py":
            yield path


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file names in an import, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {name for name in found if name in known}


def room(module: str) -> str:
    """The package that a module counts to; empty for the top, `tessellar/__init__.py`."""
    parts = module.split(".")
    if len(parts) == 1:
        return ""
    return "parity" if parts[-1] == "parity" else parts[1]


def violations(root: Path) -> list[str]:
    """Imports against the order, and rooms that the order does not know; one line each."""
    known = modules(root)
    lines = []
    for module, path in known.items():
        own = room(module)
        if own and own not in LEVEL:
            lines.append(f"{module} lies in {own}, which has no place in the order")
            continue
        for target in sorted(imports(path, known)):
            other = room(target)
            if own in ("", other) or (own in GROUND and other == "errors"):
                continue
            if other not in LEVEL or LEVEL[other] >= LEVEL[own]:
                lines.append(f"{module} ({own}) imports {target} ({other or 'the top'})")
    return lines


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    found = violations(root)
    print("\n".join(found) or f"{len(modules(root))} modules import in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
