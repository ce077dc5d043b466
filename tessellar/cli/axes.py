"""Options with several values: what the two sweeps (of sampling, `evaluate.py sweep`, and of training,
`tessellar sweep`) make of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tessellar.errors import UserError

MOST_POINTS = 1000


def combinations(
    axes: Mapping[str, Sequence[Any]], most: int = MOST_POINTS
) -> list[dict[str, Any]]:
    """All combinations of the values of all axes, the last axis fastest; one empty point without axes.

    Raises UserError for more than `most`, and for an axis without a list of values.
    """
    for name, values in axes.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"--axes: {name} needs a list of values, not {values!r:.80}")
    rows = [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    if len(rows) > most:
        raise UserError(f"{len(rows)} combinations are more than {most}; sweep fewer")
    return rows


def spelled_values(values: Mapping[str, Any]) -> str:
    """A point as options of a command line."""
    return " ".join(f"--{name} {value}" for name, value in values.items()) or "one point"
