"""Classes as people name them: by name, by id, or several in one text such as `maps,people,0-3`.

Where the names of a model's classes are whole numbers themselves (folders 2, 10, ...), a number in a
text is a name: nobody knows that folder 10 has id 1. A Python int is always an id.
"""

import re
from collections.abc import Sequence

from tessellar.errors import UserError
from tessellar.protocol.nearest import nearest

RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")
ALL = "all"

Classes = str | int | Sequence[str | int]


LONGEST = 40  # characters of a number or a range


def class_ids(classes: Classes, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Ids of classes: an id, a name, a list of both, or a text of names, ids and ranges with commas,
    or `all`.

    `names[k]` is the name of class k, and there may be none. Raises UserError for what is no class.
    """
    if isinstance(classes, str):
        found = _of_text(classes, num_classes, names)
    elif isinstance(classes, int):
        found = [classes]
    else:
        found = []
        for one in classes:
            found += [_of_name(one, names)] if isinstance(one, str) else [int(one)]
    wrong = next((label for label in found if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise UserError(f"class id {wrong} does not exist; classes are 0 to {num_classes - 1}")
    if not found:
        raise UserError("no class is named; give ids, names, or `all`")
    return found


def numbers_are_names(names: Sequence[str]) -> bool:
    """Whether a number in a text is a name: all names are whole numbers, and not simply their ids."""
    whole = bool(names) and all(map(str.isdecimal, names))
    return whole and list(names) != list(map(str, range(len(names))))


def _of_text(text: str, num_classes: int, names: Sequence[str]) -> list[int]:
    if text.strip() == ALL and ALL not in names:
        return list(range(num_classes))
    parts = text.split(",")
    found: list[int] = []
    start = 0
    while start < len(parts):
        # A name may hold commas itself, so that of the most parts is taken.
        ends = range(len(parts), start, -1)
        end = next((e for e in ends if _find(",".join(parts[start:e]), names) is not None), None)
        if end is None:
            found += _of_part(parts[start], names, num_classes)
            end = start + 1
        else:
            found.append(_of_name(",".join(parts[start:end]), names))
        start = end
    return found


def _of_part(part: str, names: Sequence[str], num_classes: int) -> list[int]:
    """Ids of a range, a number, or (which raises) of an unknown name."""
    bounds = RANGE.fullmatch(part)
    if bounds is None or len(part) > LONGEST:
        return [_of_name(part, names)]
    first = int(bounds[1])
    last = int(bounds[2])
    if first > last:
        raise UserError(f"the range {part.strip()} of classes ends before it begins")
    if not numbers_are_names(names):
        if last >= num_classes:  # before the range is written out
            raise UserError(f"class id {last} does not exist; classes are 0 to {num_classes - 1}")
        return list(range(first, last + 1))
    inside = [label for label, name in enumerate(names) if first <= int(name) <= last]
    return inside or [_of_name(part, names)]


def _of_name(text: str, names: Sequence[str]) -> int:
    """The id of a name, or of a number in a text; raises UserError for neither."""
    label = _find(text, names)
    if label is not None:
        return label
    name = text.strip()
    if name.isdecimal() and len(name) <= LONGEST and not numbers_are_names(names):
        return int(name)
    if not names:
        raise UserError(
            f"{name!r} is not a class id, and this model does not know the names of its classes: give ids "
            "such as 0,3,5 or 0-9, or `all`"
        )
    raise UserError(f"there is no class {name!r}{nearest(name, names)}")


def _find(text: str, names: Sequence[str]) -> int | None:
    """The id of a name as it is, else of the one that differs in case, in `_` for a space, and in
    spaces around it; None where there is none.

    Raises UserError where several classes have the name.
    """
    name = text.strip()
    exact = [label for label, known in enumerate(names) if known == name]
    found = exact or [label for label, known in enumerate(names) if _plain(known) == _plain(name)]
    if len(found) > 1:
        ids = " and ".join(map(str, found))
        raise UserError(f"the classes {ids} are all named {name!r}: give the id")
    return found[0] if found else None


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").casefold()
