"""JSON and YAML from files that others may have written, as plain data, within limits.

A parser alone is not enough: brackets nested a thousand deep end in a RecursionError, half a
kilobyte of YAML aliases or merge keys unfolds to gigabytes, and an alias may hold itself. What
passes here has a bounded size and depth and may be walked without care.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tessellar.errors import UserError, check_is_file

MAX_BYTES = 32 << 20
MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # unfolded: the vocabulary of a caption model has some 100,000


class Unbounded(UserError):
    """Data beyond the limits."""


class Repeated(UserError):
    """A key that is given twice: of the two a parser takes the last, and drops the other without a
    word.
    """


def parse_json(text: str | bytes, where: str) -> Any:
    """The data of a JSON text; raises UserError, in one line that begins with `where`, for anything
    else.
    """
    _check_size(text, where)
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise Unbounded(_nested(where)) from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({_short(error)})") from error
    check_plain(data, where)
    return data


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The data of a YAML text, made of plain types only; raises UserError as `parse_json` does."""
    _check_size(text, where)
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except RecursionError as error:
        raise Unbounded(_nested(where)) from error
    except Repeated as error:
        raise Repeated(f"{where} {error}") from error
    # a date that is none is a ValueError, text of another encoding too
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} is not YAML ({_short(error)})") from error
    check_plain(data, where)
    return data


def read_json(path: Path) -> Any:
    """`parse_json` of a file; raises UserError also where it cannot be read."""
    return parse_json(_read(path), str(path))


def read_yaml(path: Path) -> Any:
    """`parse_yaml` of a file; raises UserError also where it cannot be read."""
    return parse_yaml(_read(path), str(path))


def check_plain(data: Any, where: str) -> None:
    """Raise UserError for data that is nested too deep, holds itself, or is too large once aliases
    are unfolded.
    """
    values = 0
    pending = [iter((data,))]  # one iterator for each level
    while pending:
        for value in pending[-1]:
            values += 1
            if values > MAX_VALUES:
                raise Unbounded(
                    f"{where} holds more than {MAX_VALUES} values, unfolded; that is no description"
                )
            if isinstance(value, (dict, list, tuple)):
                if len(pending) > MAX_DEPTH:
                    raise Unbounded(_nested(where))
                inside = value.values() if isinstance(value, dict) else value
                pending.append(iter(inside))
                break
        else:
            pending.pop()


class _Loader(yaml.SafeLoader):
    """Without merge keys (`<<`): nothing that we write has them, and nested they grow without end
    while they are read. Without keys that are given twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        marks: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            first = marks.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                raise Repeated(
                    f"gives {key.value[:60]!r} in line {first.line + 1} and again in line "
                    f"{key.start_mark.line + 1}; make one of the two"
                )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not read", node.start_mark
            )


def _read(path: Path) -> bytes:
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_size(text: str | bytes, where: str) -> None:
    if len(text) > MAX_BYTES:
        raise Unbounded(f"{where} has more than {MAX_BYTES >> 20} MB; that is no description")


def _nested(where: str) -> str:
    return f"{where} is nested more than {MAX_DEPTH} deep, or holds itself"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
