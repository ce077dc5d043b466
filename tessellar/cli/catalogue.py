"""What there is to choose from: systems, data sets, algorithms, configs.

Sources are read, not imported, so that a list is there at once: a system is a folder with a header,
its models are the functions and classes that its package names.
"""

import ast
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from tessellar.checkpoints.zoo import FILE as ZOO_FILE
from tessellar.checkpoints.zoo import zoo
from tessellar.errors import UserError
from tessellar.protocol.nearest import nearest

PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
KINDS = ("tokenizers", "generators", "data", "configs", "algorithms", "weights")
FOLDERS = {"tokenizers": "tokenizers", "generators": "models"}
FILES = {"tokenizers": "tokenizer.py", "generators": "model.py"}
NO_MODELS = ("official.py", "parity.py")  # files of a system that make none
SHARED = ("parts", "losses", "quantizers")  # rooms of the papers' folders that are no system
ARXIV = re.compile(r"\d{4}\.\d{5}")


@dataclass(frozen=True)
class Entry:
    """One thing to choose: its name, one line about it, its file, and of which of KINDS it is."""

    name: str
    what: str
    file: Path
    kind: str

    @cached_property
    def offers(self) -> tuple[str, ...]:
        """Names of the classes and presets that a config can hold; none of a config itself."""
        if (
            self.kind in FOLDERS
        ):  # read when they are asked for: it takes the sources of all systems
            return tuple(models_of(self.file.parent, parsed(self.file)))
        return () if self.kind in ("configs", "weights") else (self.name,)

    @property
    def papers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(ARXIV.findall(self.what)))

    @property
    def short(self) -> str:
        """The line without its papers."""
        return re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", self.what).rstrip(".:;, ")


def entries(kind: str, packages: str = "") -> list[Entry]:
    """All of one of KINDS, by name; `packages` of others, separated by commas, add their systems."""
    if kind in FOLDERS:
        found: list[Entry] = []
        for folder in (PACKAGE / FOLDERS[kind], *folders_of(packages)):
            found += _systems(folder, kind)
        return found
    if kind == "data":
        return data_sets()
    if kind == "configs":
        return configs()
    if kind == "algorithms":
        return algorithms()
    if kind == "weights":
        return weights()
    raise UserError(f"there is no list of {kind!r}{nearest(kind, KINDS)}")


def matching(found: list[Entry], pattern: str) -> list[Entry]:
    """Entries whose name, or a name that they offer, fits a shell pattern, or holds it as a part."""
    lowered = pattern.lower()
    wanted = lowered if set("*?[") & set(lowered) else f"*{lowered}*"
    fitting = []
    for entry in found:
        names = [name.lower() for name in (entry.name, *entry.offers)]
        if fnmatch.filter(names, wanted):
            fitting.append(entry)
    return fitting


@cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Names that a module imports from others: as it calls them, their module, their name there."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, node.module, alias.name


def assigned(tree: ast.Module, name: str) -> ast.expr:
    """What a module assigns to a name of its own."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise KeyError(name)


def first_sentence(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The first paragraph of a docstring, in one line."""
    docstring = ast.get_docstring(node) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def class_path(kind: str, name: str) -> str | None:
    """The path of a model of ours by its short name, such as titok_b64; None for anything else."""
    for entry in entries(kind):
        if name in entry.offers:
            return f"tessellar.{FOLDERS[kind]}.{entry.name}.{name}"
    return None


def folders_of(packages: str) -> list[Path]:
    """Folders of packages of others, which are looked up and not imported."""
    folders = []
    for name in filter(None, packages.replace(" ", "").split(",")):
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"package {name!r} is not found: install it, or name it in PYTHONPATH")
        folders += map(Path, spec.submodule_search_locations)
    return folders


def _systems(folder: Path, kind: str) -> Iterator[Entry]:
    """The systems in a folder; the folder itself is one where it holds a system's file."""
    file = FILES[kind]
    for package in [folder, *sorted(filter(Path.is_dir, folder.iterdir()))]:
        header = package / "__init__.py"
        if package.name in SHARED or not header.is_file() or not (package / file).is_file():
            continue
        yield Entry(package.name, first_sentence(parsed(header)), header, kind)


def models_of(package: Path, header: ast.Module) -> list[str]:
    """Names that a package offers and that build a model: classes of systems, and their presets."""
    files = tuple(file for file in sorted(package.glob("*.py")) if file.name not in NO_MODELS)
    own = _classes(files)
    bases = {**_of_all_papers(), **own}
    builders = {name for name in own if derives(name, ROOTS, bases)}
    for file in files:
        for node in parsed(file).body:
            if isinstance(node, ast.FunctionDef) and node.returns is not None:  # maybe a preset
                made = ast.unparse(node.returns).strip("'\"")
                if derives(made, ROOTS, bases):
                    builders.add(node.name)
    return [name for name, _, _ in imported(header) if name in builders]


ROOTS = (
    "Tokenizer",
    "QuantizedTokenizer",
    "GridTokenizer",
    "Generator",
    "MaskedGenerator",
)


@cache
def _of_all_papers() -> dict[str, tuple[str, ...]]:
    """Bases of every class in the papers' folders."""
    files: list[Path] = []
    for room in FOLDERS.values():
        found = sorted((PACKAGE / room).rglob("*.py"))
        files += [file for file in found if file.name not in NO_MODELS]
    return _classes(tuple(files))


@cache
def _classes(files: tuple[Path, ...]) -> dict[str, tuple[str, ...]]:
    """Names of the bases of every class in some files."""
    bases = {}
    for file in files:
        for node in parsed(file).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = tuple(ast.unparse(b).rpartition(".")[2] for b in node.bases)
    return bases


def derives(name: str, roots: tuple[str, ...], bases: dict[str, tuple[str, ...]]) -> bool:
    """Whether a class is, or derives from, one of `roots`."""
    if name in roots:
        return True
    return any(derives(base, roots, bases) for base in bases.get(name, ()) if base != name)


def data_sets() -> list[Entry]:
    """The data sets that `tessellar.data` names."""
    header = PACKAGE / "data" / "__init__.py"
    found = []
    for name, module in ast.literal_eval(assigned(parsed(header), "_HOMES")).items():
        if name.endswith("Data"):
            file = header.parent / f"{module.replace('.', '/')}.py"
            found.append(Entry(name, first_sentence(definition(file, name)), file, "data"))
    return found


def definition(file: Path, name: str) -> ast.ClassDef | ast.FunctionDef:
    """The class or function `name` of a file."""
    for node in parsed(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{file} defines no {name}")


def algorithms() -> list[Entry]:
    """Decoding algorithms: classes of `tessellar/sampling` that derive from Algorithm."""
    files = tuple(sorted((PACKAGE / "sampling").glob("*.py")))
    bases = _classes(files)
    found = []
    for file in files:
        for node in parsed(file).body:
            if not isinstance(node, ast.ClassDef) or "abstractmethod" in ast.unparse(node):
                continue
            if derives(node.name, ("Algorithm",), bases):
                found.append(Entry(node.name, first_sentence(node), file, "algorithms"))
    return found


def configs() -> list[Entry]:
    """The configs of this package, and those of the folder `configs` here where it is another one."""
    roots = [CONFIGS]
    here = Path("configs")
    if here.is_dir() and here.resolve() != CONFIGS.resolve():
        roots.append(here)
    found = []
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            found.append(Entry(config_name(file, root), header_line(file), file, "configs"))
    return found


def weights() -> list[Entry]:
    """Published checkpoints that `tessellar.load` and `convert.py import` know by name."""
    found = []
    for name, checkpoint in zoo().items():
        what = f"{checkpoint.what} (arXiv {checkpoint.arxiv})"
        found.append(Entry(name, what, ZOO_FILE, "weights"))
    return found


def config_name(file: Path, root: Path = CONFIGS) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def header_of(file: Path) -> list[str]:
    """The lines of comment that a YAML begins with, without their marks."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def header_line(file: Path) -> str:
    """The first sentence of a YAML's header, which may take several lines."""
    said = []
    for line in header_of(file):
        if line.startswith("python "):
            break
        said.append(line)
        if line.endswith("."):
            break
    return re.split(r"(?<=[a-z0-9)])\. ", " ".join(said))[0]


def config_file(name: str) -> Path:
    """The file of a config: its path, or that of one of ours by its name, such as demo/tokenizer.

    Raises UserError for what is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    bare = name.removesuffix(".yaml")
    inner = bare.removeprefix("configs/")
    for candidate in (Path(f"{bare}.yaml"), Path("configs") / f"{inner}.yaml"):
        if candidate.is_file():
            return candidate
    ours = CONFIGS / f"{inner}.yaml"
    if ours.is_file() and ours.resolve().is_relative_to(CONFIGS.resolve()):
        return ours
    hint = nearest(inner, map(config_name, CONFIGS.rglob("*.yaml")), listed=0)
    raise UserError(
        f"--config {name}: there is no such file, nor a config of that name{hint}; "
        "`tessellar list configs` lists them"
    )
