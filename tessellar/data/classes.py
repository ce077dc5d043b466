"""Which number a class has: one rule for every reader that meets classes by name.

Names that are all whole numbers are ordered by value (2 before 10), any others as text. Numbers of
classes are places in that order, so two sets compare classes by name, never by number.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache

log = logging.getLogger(__name__)
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(WHOLE_NUMBER.fullmatch(name) for name in names)


def order_classes(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The distinct names, in the order that numbers them; `where` names the set in the line about
    their order.
    """
    as_text = sorted(set(names))
    if not are_numbers(as_text):
        return tuple(as_text)
    by_value = sorted(as_text, key=int)
    if by_value != as_text:
        _tell(where, shown(as_text))
    return tuple(by_value)


def shown(names: Sequence[str], most: int = 5) -> str:
    """The first names, for messages."""
    text = ", ".join(map(repr, names[:most]))
    return f"{text}, ..." if len(names) > most else text


@cache  # a set is listed several times in a run, and said once
def _tell(where: str, as_text: str) -> None:
    log.warning(
        "%s: classes are numbered by value; older models may have numbered them as text (%s)",
        where,
        as_text,
    )
