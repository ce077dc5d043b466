"""Configured: objects that remember how they were constructed, so that exports and checkpoints can rebuild them.

`obj.config` is plain data (`class_path`, `init_args`) and `build` turns it back into an object. Class paths are
accepted only from this package, so a hostile config cannot name an arbitrary callable.
"""

import functools
import importlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from tessellar.errors import UserError

PACKAGE = "tessellar."


class Configured:
    """Mixin that records the arguments of the outermost constructor as `config`."""

    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @property
    def config(self) -> dict[str, Any]:
        """`{"class_path": ..., "init_args": {...}}`, JSON-able; `build(config)` makes an equal object."""
        made_as = self.__dict__.get("_class", type(self))  # sharding gives a module another class
        return {"class_path": class_path(made_as), "init_args": self.__dict__.get("_config", {})}


class LossOnly:
    """Mixin of what only a training loss reads (a teacher); configs hold None in its place: exports do without it."""


def _recording(init: Any) -> Any:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_config" not in self.__dict__:
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            self.__dict__["_config"] = {name: describe(value) for name, value in arguments.items()}
            self.__dict__["_class"] = type(self)
        init(self, *args, **kwargs)

    return wrapped


def class_path(cls: type) -> str:
    """Module path of a class or function, as YAML names it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(value: Any) -> Any:
    """Plain data for a constructor argument; raises TypeError for what cannot be written down."""
    if isinstance(value, LossOnly):
        return None
    if isinstance(value, Configured):
        return value.config
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class_path": class_path(type(value)),
            "init_args": {f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init},
        }
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a constructor argument of type {type(value).__name__} cannot be written into a config")


def build(config: Any) -> Any:
    """The object that `config` describes (nested); sequences become tuples.

    Raises UserError for a class path outside this package, an unknown class, or arguments that it does not take.
    """
    if isinstance(config, list):
        return tuple(build(item) for item in config)
    if not isinstance(config, dict):
        return config
    if set(config) != {"class_path", "init_args"}:
        return {key: build(item) for key, item in config.items()}
    target = resolve(config["class_path"])
    arguments = {key: build(item) for key, item in config["init_args"].items()}
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise UserError(f"config of {config['class_path']}: {error}") from error
    return target(**arguments)


def resolve(path: str) -> Any:
    """The class behind a class path of this package; anything else is refused before it is imported."""
    module, _, name = str(path).rpartition(".")
    if not str(path).startswith(PACKAGE) or not all(part.isidentifier() for part in str(path).split(".")):
        raise UserError(f"class path {path!r} is not from this package; only tessellar.* can be loaded")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"class path {path!r} does not exist in this version ({error})") from error
    if not isinstance(target, type) or not (issubclass(target, Configured) or is_dataclass(target)):
        raise UserError(f"class path {path!r} is not something that a config may build")
    return target
