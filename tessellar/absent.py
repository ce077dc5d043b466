"""Files of weights that are not here: where a run is only tried (`train.py --dry_run`), what they
would fill stays random.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_found: ContextVar[list[str] | None] = ContextVar("absent", default=None)


@contextmanager
def random_where_absent() -> Iterator[list[str]]:
    """Within it files of weights may be missing; gives the paths that were, as they are asked for."""
    paths: list[str] = []
    token = _found.set(paths)
    try:
        yield paths
    finally:
        _found.reset(token)


def stays_random(path: str | Path) -> bool:
    """Whether weights of `path` are to be left as they were drawn: there is no such file or folder,
    and the run is only tried. Nothing that stays is made of them.
    """
    paths = _found.get()
    if paths is None or Path(path).expanduser().exists():
        return False
    if str(path) not in paths:
        paths.append(str(path))
    return True
