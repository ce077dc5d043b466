"""`tessellar list KIND [PATTERN]` and `tessellar show NAME`: what there is, and what one of it is.

Nothing heavy is imported: both answer at once.
"""

import ast
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tessellar.checkpoints.zoo import UNKNOWN, Published, published
from tessellar.cli.catalogue import (
    FOLDERS,
    KINDS,
    PACKAGE,
    Entry,
    config_file,
    config_name,
    definition,
    entries,
    header_of,
    imported,
    matching,
    parsed,
)
from tessellar.cli.spelling import spelled
from tessellar.errors import UserError, in_one_line
from tessellar.protocol.nearest import nearest

WIDEST = 120


def width() -> int:
    """Columns of the terminal, at most WIDEST."""
    return min(shutil.get_terminal_size((100, 24)).columns, WIDEST)


def list_main(argv: Sequence[str]) -> int:
    """`tessellar list KIND [PATTERN] [--package NAMES]`."""
    words, packages = _words(argv)
    if not words:
        raise UserError(f"say what to list: tessellar list {'|'.join(KINDS)} [PATTERN]")
    kind, *patterns = words
    found = entries(kind, packages)
    for pattern in patterns:
        found = matching(found, pattern)
    if not found:
        raise UserError(f"none of the {kind} fits {' '.join(patterns)!r}")
    print("\n".join(line_of(entry, kind, found) for entry in found))
    return 0


def _words(argv: Sequence[str]) -> tuple[list[str], str]:
    """Positional words, and the packages that --package names."""
    words = []
    packages = ""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--package" and rest:
            packages = rest.pop(0)
        elif word.startswith("--package="):
            packages = word.partition("=")[2]
        elif word.startswith("-"):
            raise UserError(f"there is no option {word!r}; --package NAMES is the only one")
        else:
            words.append(word)
    return words, packages


def line_of(entry: Entry, kind: str, among: Sequence[Entry]) -> str:
    """Name, what it is and its papers, and under it the models of a system."""
    column = max(len(other.name) for other in among) + 2
    papers = f" ({', '.join(entry.papers)})" if entry.papers else ""
    told = f"{entry.name:<{column}}{in_one_line(entry.short)}{papers}"
    text = textwrap.fill(told, width(), subsequent_indent=" " * column, break_on_hyphens=False)
    if kind not in FOLDERS or not entry.offers:
        return text
    models = textwrap.fill(
        " ".join(entry.offers),
        width(),
        initial_indent=" " * column,
        subsequent_indent=" " * column,
        break_on_hyphens=False,
    )
    return f"{text}\n{models}"


def show_main(argv: Sequence[str]) -> int:
    """`tessellar show NAME`: a run, a config, a system, a model, a data set or an algorithm."""
    words, packages = _words(argv)
    if len(words) != 1:
        raise UserError("say what to show: tessellar show NAME, with a name that `list` gives")
    print("\n".join(description_of(words[0], packages)))
    return 0


def description_of(name: str, packages: str) -> list[str]:
    path = Path(name)
    if path.is_dir() and (path / "run.json").is_file():
        return _run(path)
    if path.is_dir() or path.suffix in (".ckpt", ".safetensors"):
        return [f"{spelled('convert')} info {name} says what an export or a checkpoint holds"]
    known = []
    for kind in KINDS:
        for entry in entries(kind, packages):
            known += [entry.name, *entry.offers]
            if name == entry.name and kind in FOLDERS:
                return _systems(name, packages)
            if kind == "configs" and name in (entry.name, str(entry.file)):
                return _config(entry.file)
            if kind == "weights" and name == entry.name:
                return _published(published(name))
            if name in entry.offers:
                return _class(entry, name, kind)
    if path.is_file() or path.suffix == ".yaml":
        return _config(config_file(name))
    raise UserError(f"there is nothing called {name!r}{nearest(name, known, listed=0)}")


def _run(folder: Path) -> list[str]:
    """What run.json and the folder say of a run."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        data = facts.get("data", {})
        told = {
            "run": str(folder),
            "status": facts.get("status", "not stated"),
            "updates": facts.get("updates", "not stated"),
            "data": data.get("name", "not stated"),
            "started": facts.get("started", "not stated"),
            "ended": facts.get("ended", "not yet"),
            "host": facts.get("host", "not stated"),
            "command": facts.get("command", "not stated"),
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'run.json'} cannot be read ({error})") from error
    rows = [f"{key:<12}{in_one_line(str(value))}" for key, value in told.items()]
    if (folder / "export").is_dir():
        rows.append(f"{'export':<12}{folder / 'export'}")
    return rows


def _config(file: Path) -> list[str]:
    """The header of a config, and how it is called."""
    ours = file.resolve().is_relative_to((PACKAGE / "configs").resolve())
    name = config_name(file.resolve(), (PACKAGE / "configs").resolve()) if ours else str(file)
    return [*header_of(file), "", f"{spelled('train')} --config {name}"]


def _published(checkpoint: Published) -> list[str]:
    """A published checkpoint: its file, licence, size, our config, the paper's number and how to get it."""
    count = checkpoint.parameters
    told = {
        "what": f"{checkpoint.what} (arXiv {checkpoint.arxiv})",
        "repository": checkpoint.repository,
        "file": checkpoint.file,
        "size": checkpoint.size,
        "license": f"{checkpoint.license} (weights), {checkpoint.code_license} (official code)",
        "stated in": checkpoint.license_source,
        "model": checkpoint.model,
        "parameters": UNKNOWN if count is None else f"{count:,}",
        "tokenizer": checkpoint.tokenizer,
        "config": checkpoint.config,
        "published": ", ".join(f"{name} {value:g}" for name, value in checkpoint.published.items()),
        "note": checkpoint.note,
        "import": checkpoint.importing(),
        "measure": checkpoint.evaluation() or "the paper's protocol is not known here",
    }
    return [f"{name:<12}{value}" for name, value in told.items() if value]


def _systems(name: str, packages: str) -> list[str]:
    """The tokenizer and the generator of a paper, their models, and the configs that train them."""
    lines = []
    for kind in FOLDERS:
        for entry in entries(kind, packages):
            if entry.name != name:
                continue
            lines += [f"{kind.removesuffix('s')}: {entry.what}", f"    file: {_home(entry)}"]
            lines += [f"    {offered}" for offered in entry.offers]
    used = []
    uses = re.compile(rf"tessellar\.({'|'.join(FOLDERS.values())})\.{re.escape(name)}\.")
    for entry in entries("configs"):
        if uses.search(entry.file.read_text(encoding="utf-8")):
            used.append(entry.name)
    if used:
        lines.append("configs that train it:")
        lines += [f"    {spelled('train')} --config {each}" for each in used]
    lines.append("tessellar show MODEL lists a model's options")
    return lines


def _class(entry: Entry, name: str, kind: str) -> list[str]:
    """A class or a preset: its options with their defaults, what it is, and where it lies."""
    folder = entry.file.parent
    files = [entry.file, *sorted(folder.glob("*.py"))] if kind in FOLDERS else [entry.file]
    for file in files:
        try:
            node = definition(file, name)
        except LookupError:
            continue
        docstring = (ast.get_docstring(node) or "").splitlines()
        options = [f"    {option}" for option in options_of(node, file).values()]
        return [name, *docstring, "options:", *options, f"file: {_relative(file)}"]
    return [name, entry.what, f"file: {_home(entry)}"]


def options_of(node: ast.ClassDef | ast.FunctionDef, file: Path) -> dict[str, str]:
    """`name: type = default` by name: of a function, of a class's constructor with those that it
    hands on to its base, or of a dataclass's fields with those of its bases in the same file.
    """
    if isinstance(node, ast.FunctionDef):
        return _arguments(node)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            options = _arguments(item)
            if item.args.kwarg is not None:
                options = _with_handed_on(options, node, file, item)
            return options
    return _fields(node, file)


def _arguments(node: ast.FunctionDef) -> dict[str, str]:
    given = [argument for argument in node.args.args if argument.arg != "self"]
    defaults = [None] * (len(given) - len(node.args.defaults)) + list(node.args.defaults)
    options = {}
    for argument, default in zip(given, defaults, strict=True):
        kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        value = f" = {ast.unparse(default)}" if default is not None else ""
        options[argument.arg] = f"{argument.arg}{kind}{value}"
    return options


def _with_handed_on(
    own: dict[str, str], node: ast.ClassDef, file: Path, maker: ast.FunctionDef
) -> dict[str, str]:
    """With the options of the first base, of this file or an imported one, but for those that the
    constructor `maker` gives to it by name.
    """
    base = ast.unparse(node.bases[0])
    for name, module, _ in imported(parsed(file)):
        if name == base:
            file = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    options = options_of(definition(file, base), file)
    for call in ast.walk(maker):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            for keyword in call.keywords:
                options.pop(keyword.arg or "", None)
    return own | {name: option for name, option in options.items() if name not in own}


def _fields(node: ast.ClassDef, file: Path) -> dict[str, str]:
    """The fields of a dataclass by name, those of its bases first."""
    found: dict[str, str] = {}
    for base in node.bases:
        try:
            above = definition(file, ast.unparse(base))
        except LookupError:
            continue
        if isinstance(above, ast.ClassDef):
            found |= _fields(above, file)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
            found[ast.unparse(item.target)] = ast.unparse(item)
    return found


def _home(entry: Entry) -> str:
    return _relative(entry.file.parent)


def _relative(file: Path) -> str:
    """A file of this package as it is called in the checkout, another as it is."""
    try:
        return str(file.relative_to(PACKAGE.parent))
    except ValueError:
        return str(file)
