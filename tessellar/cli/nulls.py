"""Null in a YAML or an option, where a parameter takes it, and where not.

The parser takes null for any type, and hands it on as None: a weight of None switched its loss off
without a word, and a size of None ended in a comparison that names no key. An option of a class
within a class it reads twice, the second time from what Python prints: null has become None there.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import get_loader, set_loader

from tessellar.errors import UserError


def read_none_as_null() -> None:
    """Have parsers of YAML read the word None as null, wherever it stands: without this,
    `--model.tokenizer.teacher null` asks for a class called None.
    """
    plain = get_loader("yaml")

    def load(text: str) -> Any:
        return without_none(plain(text))

    set_loader("yaml", load, (yaml.YAMLError,))


def without_none(value: Any) -> Any:
    """Plain data with None in the place of the word."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return None if value == "None" else value


def refuse_nulls(config: Mapping[str, Any], owner: Callable[..., Any], key: str = "") -> None:
    """Raise UserError, naming the key, for a None among the arguments of `owner`, a class or a
    function, whose type does not have it.

    Looks into classes and dataclasses below it. An argument without a type is left alone, and so is
    a class that cannot be imported: the parser has said so.
    """
    kinds, defaults = parameters_of(owner)
    for name, value in config.items():
        place = f"{key}.{name}" if key else name
        if value is not None:
            refuse_nulls_within(value, kinds.get(name), place)
        elif name in kinds and defaults.get(name) is not None and not takes_none(kinds[name]):
            raise UserError(f"{place} is null; {_instead(defaults[name])}")


def _instead(default: Any) -> str:
    """What to do about an argument of null."""
    if default is inspect.Parameter.empty:
        return "give it a value"
    plain = isinstance(default, (bool, int, float, str))
    return f"leave it out for its default{f', {default}' if plain else ''}"


def refuse_nulls_within(value: Any, kind: Any, key: str) -> None:
    """The same for what lies in an argument: a class by its path, a dataclass, a list of them."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            refuse_nulls_within(one, None, f"{key}[{number}]")
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("class_path"), str):
        owner = _named(value["class_path"])
        below = value.get("init_args")
        if owner is not None and isinstance(below, Mapping):
            refuse_nulls(below, owner, key)
        return
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and is_dataclass(one):
            refuse_nulls(value, one, key)


def takes_none(kind: Any) -> bool:
    """Whether None is a value of a type."""
    if kind in (None, NoneType, Any, object) or isinstance(kind, (TypeVar, str)):
        return True
    if get_origin(kind) is Annotated:
        return takes_none(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return any(takes_none(one) for one in get_args(kind))
    return None in get_args(kind)  # of a Literal


def parameters_of(owner: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types and defaults of arguments by name, those that a class hands on to its base (`**options`)
    among them.
    """
    kinds: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    makers = [cls.__init__ for cls in owner.__mro__] if isinstance(owner, type) else [owner]
    for maker in makers:
        try:
            signature = inspect.signature(maker)
            hints = get_type_hints(maker, include_extras=True)
        except (NameError, TypeError, ValueError, AttributeError):
            break  # of another package, with types that are there only for a checker
        handed_on = False
        for name, parameter in signature.parameters.items():
            handed_on |= parameter.kind is parameter.VAR_KEYWORD
            if name in hints and name not in kinds:
                kinds[name] = hints[name]
                defaults[name] = parameter.default
        if not handed_on:
            break
    return kinds, defaults


def _named(path: str) -> Callable[..., Any] | None:
    """The class or function at an import path."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if callable(found) else None
