"""Configured: objects that remember how they were constructed, so that exports and checkpoints can
rebuild them.

`obj.config` is plain data (`class_path`, `init_args`) and `build` turns it back into an object.
Class paths are accepted only from this package and from those that the user named, so a hostile
config cannot name an arbitrary callable.

There are two sources of configs. A user's own YAML is trusted: its classes are made by the command
line, and may name files and downloads. What `build` reads comes from a file that others may have
written (an export, a checkpoint, a cache): it may name neither, which `refuse_outside` enforces.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from math import isinf
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from tessellar.errors import UserError
from tessellar.plain_data import check_plain
from tessellar.protocol.arguments import check_arguments
from tessellar.protocol.moved import current_arguments, current_path
from tessellar.protocol.packages import is_trusted

MAX_NUMBER = 1 << 32  # seeds are the largest numbers of a config


class Configured:
    """Mixin that records the arguments of the outermost constructor as `config`."""

    #: Raised by hand where the same tensors and arguments come to encode otherwise: older caches are then refused.
    encoding_version: ClassVar[int] = 1
    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = remembering(cls.__init__)  # type: ignore[method-assign]

    @property
    def config(self) -> dict[str, Any]:
        """`{"class_path": ..., "init_args": {...}}`, JSON-able; `build(config)` makes an equal
        object.
        """
        # Sharding gives a module another class.
        made_as = self.__dict__.get("_class", type(self))
        return {"class_path": class_path(made_as), "init_args": self.__dict__.get("_config", {})}


class NotBuildable(UserError):
    """A constructor failed on the arguments that a config gives it."""


class LossOnly:
    """Mixin of what only a training loss reads (a teacher); configs hold None in its place: exports
    do without it.
    """


def remembering(init: Any) -> Any:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = "_config" not in self.__dict__
        arguments: dict[str, Any] = {}
        if outermost:
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            self.__dict__["_config"] = {name: describe(value) for name, value in arguments.items()}
            self.__dict__["_class"] = type(self)
        try:
            init(self, *args, **kwargs)
        except (ArithmeticError, IndexError, MemoryError, RuntimeError) as error:
            # Sizes that do not go together, met somewhere deep inside.
            raise UserError(
                f"{type(self).__name__} cannot be made with {_numbers(self.__dict__['_config'])} "
                f"({' '.join(str(error).split())[:160] or type(error).__name__})"
            ) from error
        check_arguments(type(self), arguments)

    return wrapped


def _numbers(config: dict[str, Any]) -> str:
    """`width=16, num_heads=0`: arguments that are whole numbers, for messages."""
    found = []
    for name, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            found.append(f"{name}={value}")
    return ", ".join(found)[:300] or "these arguments"


def class_path(cls: type) -> str:
    """Public path of a class or function, as YAML names it: of the outermost package that has it
    under its name.

    `tessellar.models.xar.XAR`, not `tessellar.models.xar.model.XAR`: files may move, names stay.
    """
    module = cls.__module__
    while (parent := module.rpartition(".")[0]) and exports_class(parent, cls):
        module = parent
    return f"{module}.{cls.__qualname__}"


def exports_class(module: str, cls: type) -> bool:
    return (
        vars(sys.modules[module]).get(cls.__qualname__) is cls if module in sys.modules else False
    )


def describe(value: Any) -> Any:
    """Plain data for a constructor argument; raises TypeError for what cannot be written down."""
    if isinstance(value, LossOnly):
        return None
    if isinstance(value, Configured):
        return value.config
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {}
        for field in fields(value):
            if field.init:
                arguments[field.name] = describe(getattr(value, field.name))
        return {"class_path": class_path(type(value)), "init_args": arguments}
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a constructor argument of type {type(value).__name__} cannot be written into a config"
    )


def build(config: Any, expected: Any = object, where: str = "this config") -> Any:
    """The object that `config` describes (nested); sequences become tuples.

    `expected` is the annotation that the object has to fit, `where` names it in messages. Nothing
    is made before its place is known to take it: first the names of the arguments are compared with
    the signature, and each nested class with its parameter's annotation. Raises UserError for a
    class path of a package that is neither this one nor a trusted one, an unknown class, a class or
    arguments that are not taken, and for what would open a file or a connection (`refuse_outside`).
    """
    check_plain(config, where)
    _check_values(config, where)
    try:
        with reading_a_file():
            return _build(config, expected, where)
    except UserError:
        raise
    except Exception as error:  # constructors were not written for whatever a file may say
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotBuildable(f"{where} cannot be built from its config ({reason})") from error


def _check_values(config: Any, where: str) -> None:
    """Raise UserError for numbers that no architecture has, NaN and whole ones whose mere range is
    too long to walk, and for texts that no file can be called by.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            _check_values(value, name if name not in ("class_path", "init_args") else where)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _check_values(value, where)
    elif isinstance(config, (int, float)) and not abs(config) <= MAX_NUMBER:
        infinite = isinstance(config, float) and isinf(config)
        if not infinite:  # which stands for "no bound"
            raise UserError(f"{where} is {str(config)[:40]}; numbers lie within {MAX_NUMBER}")
    elif isinstance(config, str) and "\0" in config:
        raise UserError(f"{where} is {config[:40]!r}, which holds a zero byte")


def _build(config: Any, expected: Any, where: str) -> Any:
    if isinstance(config, list):
        return tuple(_build(item, _item(expected, Sequence), where) for item in config)
    if not isinstance(config, dict):
        return config
    if set(config) != {"class_path", "init_args"}:
        return {key: _build(item, _item(expected, Mapping), where) for key, item in config.items()}
    path = config["class_path"]
    target = resolve(path)
    # None for Any, or without an annotation.
    classes = [member for member in _alternatives(expected) if isinstance(member, type)]
    if not any(issubclass(target, cls) for cls in classes):
        needed = " or ".join(cls.__name__ for cls in classes) or "plain value"
        raise UserError(f"{where} must be a {needed}, not {path}")
    given = config["init_args"]
    if not isinstance(given, dict):
        raise UserError(f"config of {path}: init_args is a {type(given).__name__}, not a mapping")
    given = current_arguments(class_path(target), given)
    try:
        inspect.signature(target).bind(**given)
    except TypeError as error:
        raise UserError(f"config of {path}: {error}") from error
    hints = get_type_hints(target.__init__)
    arguments = {}
    for key, item in given.items():
        arguments[key] = _build(item, hints.get(key), f"{key} of {path}")
    return target(**arguments)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Members of a union; an annotation that is none is its only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _item(annotation: Any, kind: type) -> Any:
    """Annotation of what the sequences (or mappings, their values) of an annotation hold; None
    where it has none.

    `object` holds objects, so that a list at the top may hold anything.
    """
    if annotation is object:
        return object
    for member in _alternatives(annotation):
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, kind):
            held = [item for item in get_args(member) if item is not Ellipsis]
            return held[-1] if kind is Mapping else Union[tuple(held)]  # noqa: UP007
    return None


_reading_a_file: ContextVar[bool] = ContextVar("_reading_a_file", default=False)


@contextmanager
def reading_a_file() -> Iterator[None]:
    token = _reading_a_file.set(True)
    try:
        yield
    finally:
        _reading_a_file.reset(token)


def from_a_file() -> bool:
    """Whether `build` is making an object from the config of a file, not the command line from the
    user's own YAML.
    """
    return _reading_a_file.get()


def refuse_outside(what: str) -> None:
    """Raise UserError where `build` is making an object: exports are complete in themselves and
    open nothing.

    A constructor calls this before it opens a file or a connection that one of its arguments names.
    """
    if from_a_file():
        raise UserError(
            f"this config, read from a file, names {what}; only a run's own YAML may do that"
        )


def check_buildable(config: Any) -> None:
    """Raise UserError where a config (nested) names a class that `build` would refuse."""
    if isinstance(config, dict):
        if "class_path" in config:
            resolve(config["class_path"])
        for item in config.values():
            check_buildable(item)
    elif isinstance(config, list):
        for item in config:
            check_buildable(item)


def resolve(path: str) -> Any:
    """The class behind a class path of this package or a trusted one; all else is refused before it
    is imported.
    """
    path = current_path(str(path))
    module, _, name = str(path).rpartition(".")
    if not all(part.isidentifier() for part in str(path).split(".")) or not module:
        raise UserError(f"class path {path!r} is not the path of a class")
    if not is_trusted(module):
        package = module.partition(".")[0]
        raise UserError(
            f"class path {path!r} is not from this package but from {package!r}: if you trust that, name it, "
            f"--package {package} (in Python trust=({package!r},))"
        )
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"class path {path!r} does not exist in this version ({error})") from error
    is_one = isinstance(target, type) and (issubclass(target, Configured) or is_dataclass(target))
    if not is_one or not is_trusted(target.__module__):
        raise UserError(f"class path {path!r} is not something that a config may build")
    return target
