"""Ranges of numbers that a user gives: NaN and infinity are in none, which comparisons alone do not
say.
"""

from math import inf, isfinite
from typing import Any

from tessellar.errors import UserError


def check_number(
    name: str, value: Any, least: float = -inf, most: float = inf, above: float = -inf
) -> None:
    """Raise UserError unless `value` is a finite number in [least, most] and greater than `above`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not isfinite(value) or not least <= value <= most or value <= above:
        raise UserError(
            f"{name} is {value!r}; it must be {_spelled('a finite number', least, most, above)}"
        )


def check_whole(name: str, value: Any, least: float = -inf, most: float = inf) -> None:
    """Raise UserError unless `value` is an integer in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(
            f"{name} is {value!r}; it must be {_spelled('an integer', least, most, -inf)}"
        )


def check_name(name: str, value: Any, names: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(names)}")


def check_list(name: str, value: Any) -> tuple[Any, ...]:
    """`value` as a tuple; raise UserError unless it is a list of values."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} is {value!r}; it must be a list of numbers")
    return tuple(value)


def _spelled(kind: str, least: float, most: float, above: float) -> str:
    if above > -inf:
        return f"{kind} in ({above}, {most}]" if most < inf else f"{kind} above {above}"
    if most < inf:
        return f"{kind} in [{least}, {most}]"
    return kind if least == -inf else f"{kind} of at least {least}"
