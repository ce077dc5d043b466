"""The order of packages as a contract: each imports only what stands before it, and no files import each other in a
circle. Prints what does not hold.

Links are followed (`tessellar/models` and `tessellar/tokenizers`), imports inside functions and under TYPE_CHECKING
count. Within one level, packages do not import each other. `*/parity.py` counts as part of parity, which stands above
the papers whose outputs it replays. Circles are of single files: those of packages are against the order already.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "tessellar"
ORDER = (
    (
        "absent",
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
    ("npz",),
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
    ("serving", "page"),
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


def imports(module: str, known: dict[str, Path]) -> set[str]:
    """Other modules of the package that a module names in an import, wherever the import stands."""
    path = known[module]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = _source(node, module, path)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in known else source)
    return {name for name in found if name in known and name != module}


def _source(node: ast.ImportFrom, module: str, path: Path) -> str:
    """The module that `from ... import` reads: dots count from the file's own package."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = node.level - 1 if path.name == "__init__.py" else node.level
    package = ".".join(parts[: len(parts) - up])
    return f"{package}.{node.module}" if node.module else package


def room(module: str) -> str:
    """The package that a module counts to; empty for the top, `tessellar/__init__.py`."""
    parts = module.split(".")
    if len(parts) == 1:
        return ""
    return "parity" if parts[-1] == "parity" else parts[1]


def graph_of(root: Path) -> dict[str, set[str]]:
    """Every module of the package with those that it imports."""
    known = modules(root)
    return {module: imports(module, known) for module in known}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports against the order, and rooms that the order does not know; one line each."""
    lines = []
    for module, targets in graph.items():
        own = room(module)
        if own and own not in LEVEL:
            lines.append(f"{module} lies in {own}, which has no place in the order")
            continue
        for target in sorted(targets):
            other = room(target)
            if own in ("", other) or (own in GROUND and other == "errors"):
                continue
            if other not in LEVEL or LEVEL[other] >= LEVEL[own]:
                lines.append(f"{module} ({own}) imports {target} ({other or 'the top'})")
    return lines


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, be it through others or inside functions; one line a circle."""
    lines = []
    for group in _knots(graph):
        lines.append(f"a circle of {len(group)} files: {' -> '.join(_around(group, graph))}")
    return lines


def _knots(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of two or more nodes (Tarjan, 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_nodes: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = len(number)
        lowest[node] = number[node]
        open_nodes.append(node)
        for target in sorted(graph[node]):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in open_nodes:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            start = open_nodes.index(node)
            group = set(open_nodes[start:])
            del open_nodes[start:]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in number:
            visit(node)
    return found


def _around(group: set[str], graph: dict[str, set[str]]) -> list[str]:
    """One shortest way through a knot from its first file back to it."""
    first = min(group)
    ways = [[first]]
    seen: set[str] = set()
    while True:
        way = ways.pop(0)
        for target in sorted(graph[way[-1]] & group):
            if target == first:
                return [*way, first]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    graph = graph_of(root)
    found = violations(graph) + circles(graph)
    print("\n".join(found) or f"{len(graph)} modules import in order, without circles")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
