"""Commands from plain functions: jsonargparse's auto_cli with the habits of a shell, and one-line
errors.

A function's signature and docstring are its options and help. Added: dashes in option names, bare
and `--no-` flags, options and a last positional of several words, and a mistake that is answered by
one line with the nearest valid name.
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, auto_cli

from tessellar.cli.mistakes import cause_of, concrete, explain
from tessellar.errors import UserError
from tessellar.protocol.nearest import nearest
from tessellar.protocol.packages import trusting

Function = Callable[..., Any]

NEGATIVE = re.compile(r"-[.\d]")  # the begin of a value of a list, not of an option


@dataclass(frozen=True)
class Elsewhere:
    """A function whose module is imported when its command is called, or for the help of all."""

    module: str
    name: str

    def load(self) -> Function:
        return getattr(importlib.import_module(self.module), self.name)


def run_functions(
    components: Function | Mapping[str, Function | Elsewhere],
    argv: Sequence[str] | None = None,
    command: str = "",
) -> Any:
    """Parse `argv` (default: the command line), call the function or the subcommand it names,
    return its result.

    `command` is the name behind `tessellar` in help. Raises UserError, in one line, for arguments
    that do not fit.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    check_words(given)
    with trusting():  # a command's --package is forgotten at its end
        return _run(components, given, command)


def _run(
    components: Function | Mapping[str, Function | Elsewhere], argv: list[str], command: str
) -> Any:
    script = Path(sys.argv[0]).name
    prog = f"{script} {command}" if script == "tessellar" else script
    settings: Any = {"as_positional": True, "parser_class": FunctionParser, "prog": prog}
    if callable(components):
        return auto_cli(components, args=shell_habits(components, argv), **settings)
    places = [i for i, word in enumerate(argv) if not word.startswith("-")]
    name = argv[places[0]] if places else None
    if not {"-h", "--help"} & set(argv) and name not in components:
        commands = ", ".join(components)
        if name is None:
            raise UserError(f"say which command: {commands}; --help says what each does")
        hint = nearest(name, components, listed=0)
        raise UserError(f"{name!r} is not a command; there are {commands}{hint}")
    if name is None or name not in components:
        everything: Any = {each: _loaded(function) for each, function in components.items()}
        return auto_cli(everything, args=argv, **settings)
    rest = places[0] + 1
    function = _loaded(components[name])
    chosen: dict[str, Any] = {name: function}
    return auto_cli(chosen, args=argv[:rest] + shell_habits(function, argv[rest:]), **settings)


def check_words(argv: Sequence[str]) -> None:
    """Raise UserError for words that no file, message or record can hold."""
    for word in argv:
        if "\0" in word:
            raise UserError(f"{word[:80]!r} holds a zero byte")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word[:80]!r} is not UTF-8") from error


def _loaded(function: Function | Elsewhere) -> Function:
    return function.load() if isinstance(function, Elsewhere) else function


class FunctionParser(ArgumentParser):
    """Raises UserError instead of printing a page, and takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError for values that a class does not take."""
        try:
            return super().instantiate(*args, **kwargs)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise cause_of(error) or UserError(_plain(str(error), ())) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # The parser of a class inside the command's: the outer one says where.
        if not self.exit_on_error:
            super().error(message, ex)
        raise cause_of(ex) or UserError(_plain(message, _option_names(self))) from ex


def shell_habits(function: Function, argv: Sequence[str]) -> list[str]:
    """`argv` of a function in the form that jsonargparse reads; `function`'s annotations say what
    each option takes.
    """
    listing = _asked_listing(function, argv)
    if listing is not None:
        print(listing)
        raise SystemExit(0)
    hints = get_type_hints(function)
    lists: dict[str, list[str]] = {}
    plain: list[str] = []
    positionals: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            (plain if word.startswith("-") else positionals).append(word)
            continue
        name, value = _option(word)
        if name.startswith("no_") and hints.get(name[3:]) is bool and value is None:
            plain.append(f"--{name[3:]}=false")
        elif hints.get(name) is bool and value is None:
            given = "true"
            if words and words[0].lower() in ("true", "false"):
                given = words.pop(0).lower()
            plain.append(f"--{name}={given}")
        elif _is_list(hints.get(name)):
            values = [] if value is None else [value]
            if value is None:
                missing = len(_required_names(function)) - len(positionals)
                values = take_list(words, missing, hints)
            lists.setdefault(name, []).extend(_split(values))
        else:
            takes_next = (
                value is None and words and not words[0].startswith("--") and name != "help"
            )
            value = words.pop(0) if takes_next else value
            plain.append(f"--{name}" if value is None else f"--{name}={value}")
    plain += [f"--{name}={json.dumps(values)}" for name, values in lists.items()]
    required = _required_names(function)
    if required and _is_list(hints[required[-1]]) and len(positionals) >= len(required):
        # The words of a last positional list are one.
        single = len(required) - 1
        positionals = [*positionals[:single], json.dumps(positionals[single:])]
    return [*positionals, *plain]


def _required_names(function: Function) -> list[str]:
    parameters = inspect.signature(function).parameters
    return [name for name, each in parameters.items() if each.default is each.empty]


def take_list(words: list[str], missing: int, hints: Mapping[str, Any]) -> list[str]:
    """The words of a list, taken off `words`: up to the next option; where `missing` positional
    words are still to come, the last ones that are paths are left for them.
    """
    taken: list[str] = []
    while words and (not words[0].startswith("-") or NEGATIVE.match(words[0])):
        taken.append(words.pop(0))
    for _ in range(missing - _positionals_of(words, hints)):
        if len(taken) > 1 and Path(taken[-1]).exists():
            words.insert(0, taken.pop())
    return taken


def _positionals_of(words: Sequence[str], hints: Mapping[str, Any]) -> int:
    """How many words belong to no option."""
    count = 0
    in_list = False
    expects_value = False
    for word in words:
        if word.startswith("--"):
            name, value = _option(word)
            flag = hints.get(name) is bool or name.startswith("no_")
            in_list = value is None and _is_list(hints.get(name))
            expects_value = value is None and not flag and not in_list
        elif expects_value or in_list:
            expects_value = False
        elif not word.startswith("-"):
            count += 1
    return count


def _asked_listing(function: Function, argv: Sequence[str]) -> str | None:
    """What a bare `--algorithm.help` asks for: the classes that can be chosen, with their options
    and defaults.
    """
    hints = get_type_hints(function)
    for word, after in zip(argv, [*argv[1:], "--"], strict=False):
        name = word.removeprefix("--").removesuffix(".help").replace("-", "_")
        if word != f"--{name}.help" or not after.startswith("--"):
            continue
        for kind in (hints.get(name), *get_args(hints.get(name))):
            if isinstance(kind, type) and inspect.isabstract(kind):
                return "\n".join(_listed(name, cls) for cls in concrete(kind))
        for kind in (hints.get(name), *get_args(hints.get(name))):
            if isinstance(kind, type) and is_dataclass(kind):
                return _listed(name, kind)
    return None


def _listed(name: str, cls: type) -> str:
    first = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
    lines = [f"--{name} {cls.__name__}: {first}"]
    for parameter in inspect.signature(cls).parameters.values():
        default = f"default {parameter.default}"
        if parameter.default is parameter.empty:
            default = "required"
        lines.append(f"    --{name}.{parameter.name} ({default})")
    return "\n".join(lines)


def _option(word: str) -> tuple[str, str | None]:
    name, equals, value = word[2:].partition("=")
    return name.replace("-", "_"), value if equals else None


def _split(words: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for word in words:
        if Path(word).exists():  # whatever its name
            parts.append(word)
        else:
            parts += filter(None, word.strip("[]").split(","))
    return parts


def _is_list(hint: Any) -> bool:
    if get_origin(hint) is dict:
        return False
    return get_origin(hint) is list or any(get_origin(h) is list for h in get_args(hint))


def _plain(message: str, names: Sequence[str]) -> str:
    """What a parser says, in one line; `names` are its options and commands."""
    if message.startswith("Parser key"):
        text = explain(message, names, (), ())
        key = message.split('"')[1]
        return f"--{text}" if text.startswith(key) else text
    if message.startswith(("unrecognized arguments: --", "Does not validate against")):
        return explain(message, names, (), ())
    text = " ".join(message.split())
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"{found[1]} missing; --help says what it is"
    choice = re.search(r"invalid choice: '([\w.]+)'", text)
    return text + (nearest(choice[1], names, listed=0) if choice else "")


def _option_names(parser: ArgumentParser) -> list[str]:
    """Long options of a parser and its subcommands, and the subcommands."""
    names = [option.lstrip("-") for option in parser._option_string_actions]
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            for name, inner in action.choices.items():
                names += [name, *_option_names(inner)]
    return names
