"""One line for what a parser says in sixty: which file and key, what is wrong, and the nearest
valid name.

jsonargparse reports trees: each union, class and key adds a level of indentation. The deepest
branch holds the cause.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tessellar.cli.catalogue import imported
from tessellar.errors import UserError
from tessellar.processes.diffusion import DiffusionSampler
from tessellar.processes.flow import Flow
from tessellar.protocol.guidance import GuidanceSchedule
from tessellar.protocol.nearest import nearest
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.editing.edits import Edit
from tessellar.sampling.search.searching import Search
from tessellar.sampling.search.verifiers import Verifier

PACKAGE = Path(__file__).parents[1]
ROOMS = ("models", "tokenizers")  # where papers' packages are
NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value")
WHOLE = ("Problems parsing config", "Unexpected config")  # not trees
KEY = re.compile(r'Parser key "([\w.]+)":\s*(.*)')
CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
CALLABLE = re.compile(r"^(\s*(?:- )?)Type .*? expects a function or a callable class: ")
GOT_CLASS = re.compile(r"\.+ Got value: Namespace\(class_path='([\w.]+)'.*$")


CHOICES: dict[str, type] = {
    "algorithm": Algorithm,
    "guidance": GuidanceSchedule,
    "flow": Flow,
    "diffusion": DiffusionSampler,
    "search": Search,
    "edit": Edit,
    "verifier": Verifier,
}


@dataclass(frozen=True)
class Cause:
    """The end of the deepest branch: keys and class on the way to it, its text, and the value it
    complains of.
    """

    keys: tuple[str, ...]
    class_path: str | None
    texts: tuple[str, ...]
    value: str | None

    @property
    def place(self) -> str:
        return ".".join(self.keys)


def explain(message: str, options: Iterable[str], files: Sequence[str], argv: Sequence[str]) -> str:
    """`message` of a parser in one line; `options` are the parser's names, `files` the configs that
    it read.
    """
    if message.startswith(WHOLE):
        cause = Cause((), None, (" ".join(message.split()),), None)
    else:
        cause = deepest(message)
    text = _say(cause, set(options))
    words = _words(cause)
    given: set[str] = set()  # on the command line
    for argument in argv:
        if argument.startswith("--"):
            given |= set(argument[2:].partition("=")[0].split("."))
    if words and words[-1].split(".")[-1] in given:
        files = []
    return ": ".join([*files_holding(files, cause), text])


def deepest(message: str) -> Cause:
    """The cause in a tree of complaints; siblings that all say `Expected ...` belong together."""
    path: dict[int, str] = {}  # the complaints above the present one, by their indentation
    best: tuple[int, list[str], list[str]] = (-1, [], [])
    class_path = None
    values = {}
    for line in filter(str.strip, message.splitlines()):
        found = GOT_CLASS.search(line)
        class_path = found[1] if found else class_path
        line = CALLABLE.sub(r"\1", GOT_CLASS.sub("", line))
        level = len(line) - len(line.lstrip(" -"))
        text = line.strip(" -")
        for depth in [*path]:
            if depth >= level:
                del path[depth]
        if text.startswith("Given value:"):
            values[level] = text.partition("Given value:")[2].strip()
        if not text or text.startswith(NOISE):
            continue
        key = KEY.match(text)
        if key or CLASS.match(text):
            path[level] = text
            text = key[2] if key else ""
        above = list(path.values())
        if text and level > best[0]:
            best = (level, above, [text])
        elif text and level == best[0] and text.startswith("Expected") and above == best[1]:
            best[2].append(text)
    keys = []
    class_above = None
    for part in best[1]:
        if key := KEY.match(part):
            keys.append(key[1])
        elif found := CLASS.match(part):
            class_above = found[1]
    value = None
    for level in sorted(values):
        if level < best[0]:
            value = values[level]
    return Cause(tuple(keys), class_path or class_above, tuple(best[2]), value)


def _say(cause: Cause, options: set[str]) -> str:
    text = cause.texts[0] if cause.texts else ""
    prefix = f"{cause.place}: " if cause.place else ""
    if found := re.match(r"Option '([\w.]+)' is not accepted", text):
        owner = f"{_short(cause.class_path)} ({cause.place})" if cause.class_path else "there"
        names = _parameters(cause.class_path) if cause.class_path else _under(options, "")
        key = found[1].split(".")[0]
        verb = "has" if cause.class_path else "is"
        return f"{owner} {verb} no option {key!r}{nearest(key, names)}"
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        names = _members(cause.class_path, found[1]) | _under(options, found[1])
        owner = ".".join([*cause.keys, found[1]])
        return f"{owner} has no option {found[2]!r}{nearest(found[2], names)}"
    if found := re.match(r"unrecognized arguments: (?:--)?([\w.-]+)", text):
        group, _, key = found[1].rpartition(".")
        names = _members(cause.class_path, group) | _under(options, group)
        return f"{prefix}there is no option {found[1]!r}{nearest(key, names, 0)}"
    if found := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return (
            f"{prefix}there is no {found[2]!r} in {found[1]}{nearest(found[2], contents(found[1]))}"
        )
    if found := re.match(
        r"(?:Import path|Expected) '?([\w.]+)'? (?:does not correspond|to be).*subclass of (?:<class ')?(\w+)",
        text,
    ):
        return f"{prefix}{_short(found[1])} is not a {found[2]}; a {found[2]} is needed here"
    if found := re.match(r"Expected a (?:path but|dot import path string:) ([\w.+-]+)", text):
        names = _choices(cause.place.rpartition(".")[2])
        hint = _papers_with(found[1]) or nearest(found[1], names)
        return f"{prefix}there is no {found[1]!r}{hint}"
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"{prefix}{found[1]} missing; give it in the --config or as an option"
    if text == "argument of type 'NoneType' is not iterable":  # where a class path is null
        return f"{prefix}class_path missing; it names a class"
    if found := re.match(r"Expected an instantiatable class, but ([\w.]+) is abstract", text):
        return f"{prefix}class_path missing; it names a {_short(found[1])}"
    if text.startswith("Problems parsing config"):
        return text.replace("Problems parsing config", "not valid YAML").replace(
            ' in "<unicode string>",', " in"
        )
    if text.startswith("Unexpected config"):
        return "a config is a mapping of keys (trainer, model, data); this is something else"
    if text.startswith("Expected"):
        return prefix + say_expected(cause)
    return prefix + " ".join(text.split())


def say_expected(cause: Cause) -> str:
    """`Expected a X. Got value: V` of one or several alternatives in plain words."""
    wanted = []
    value = cause.value
    for text in cause.texts:
        kind, _, got = text.partition(". Got value: ")
        value = got or value
        kind = re.sub(r"^Expected an? ", "", kind)
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
        literal = re.match(r"typing\.Literal\[(.*)\]", kind)
        wanted += literal[1].split(", ") if literal else [kind]
    while "NoneType" in wanted:
        wanted.remove("NoneType")
    names = [word.strip("'") for word in wanted]
    return f"expected {' or '.join(wanted)}, not {value!r}{nearest(str(value), names, 0)}"


def _choices(option: str) -> list[str]:
    """Names of the classes that an option of sampling chooses among."""
    base = CHOICES.get(option)
    return [] if base is None else [cls.__name__ for cls in concrete(base)]


def concrete(base: type) -> list[type]:
    """Classes below `base` that can be made, in the order of their definition."""
    found = [] if inspect.isabstract(base) else [base]
    for below in base.__subclasses__():
        found += concrete(below)
    return list(dict.fromkeys(found))


def _papers_with(name: str) -> str:
    """A hint where a paper's package exports a class or a preset of this name: it is written with
    its package.
    """
    exported = []
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("*/__init__.py")):
            header = ast.parse(file.read_text(encoding="utf-8"))
            if any(offered == name for offered, _, _ in imported(header)):
                exported.append(f"tessellar.{room}.{file.parent.name}.{name}")
    return f"; did you mean {' or '.join(exported)}?" if exported else ""


def _short(class_path: str | None) -> str:
    return (class_path or "").rpartition(".")[2]


def _resolve(class_path: str | None) -> Any:
    module, _, name = (class_path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _parameters(class_path: str | None) -> set[str]:
    """Options of a class, those that it hands on to its base (`**options`) among them."""
    names: set[str] = set()
    target = _resolve(class_path)
    for cls in inspect.getmro(target) if inspect.isclass(target) else filter(None, [target]):
        handed_on = set()
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                handed_on.add(name)
            else:
                names.add(name)
        if not handed_on:
            break
    return names


def _members(class_path: str | None, group: str) -> set[str]:
    """Options inside a dataclass argument `group` of a class."""
    target = _resolve(class_path)
    hint = get_type_hints(target.__init__).get(group) if isinstance(target, type) else None
    return {f.name for f in fields(hint)} if is_dataclass(hint) else set()


def _under(options: Iterable[str], group: str) -> set[str]:
    start = f"{group}." if group else ""
    names = set()
    for option in options:
        if option.startswith(start):
            names.add(option.removeprefix(start).split(".")[0])
    return names


def contents(module: str) -> set[str]:
    """Public names and sub-modules of a module of this package; nothing is imported for a foreign
    one.
    """
    if not module.startswith("tessellar"):
        return set()
    found = importlib.import_module(module)
    names = {*dir(found), *getattr(found, "__all__", [])}
    for info in pkgutil.iter_modules(getattr(found, "__path__", [])):
        names.add(info.name)
    return {name for name in names if not name.startswith("_")}


def _words(cause: Cause) -> list[str]:
    """The key or name that the cause is about."""
    text = cause.texts[0] if cause.texts else ""
    if option := re.match(r"unrecognized arguments: (?:--)?([\w.-]+)", text):
        return [option[1]]
    quoted = re.findall(r"'([\w.]+)'", text) if not text.startswith("Expected") else []
    return quoted or list(cause.keys[-1:])


def files_holding(files: Sequence[str], cause: Cause) -> list[str]:
    """The configs that hold the offending word; all of them where that cannot be told."""
    words = _words(cause) or [""]
    word = re.compile(rf"\b{re.escape(words[-1].split('.')[0])}\b")
    there = []
    hit = []
    for file in filter(None, files):
        if Path(file).is_file():
            there.append(file)
            if word.search(Path(file).read_text(encoding="utf-8", errors="replace")):
                hit.append(file)
    return [", ".join(hit or there)] if there else []


def cause_of(error: BaseException | None) -> UserError | None:
    """The UserError that a parser wrapped into its own errors, if there is one."""
    seen = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
