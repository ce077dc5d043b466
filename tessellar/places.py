"""Where runs lie: `runs/` in the current folder, or what TESSELLAR_RUNS names.

On clusters code lies in a small home folder and runs on a large disk. A path that begins with
`runs/` is then looked for there too, so that configs and commands stay as they are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUNS = "TESSELLAR_RUNS"
DEFAULT = "runs"


def runs_root() -> Path:
    """The folder of all runs."""
    return Path(os.environ.get(RUNS) or DEFAULT).expanduser()


def put_runs_into(root: str) -> None:
    """Let runs lie in `root` from now on, for child processes too."""
    os.environ[RUNS] = root


@contextmanager
def runs_stay() -> Iterator[None]:
    """What `put_runs_into` says within is forgotten at the end."""
    before = os.environ.get(RUNS)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RUNS, None)
        else:
            os.environ[RUNS] = before


def in_runs(path: str | Path) -> Path:
    """`path`, or, where it begins with `runs/` and is not there, its place below the root of runs."""
    given = Path(path).expanduser()
    inside = given.parts[:1] == (DEFAULT,)
    return runs_root().joinpath(*given.parts[1:]) if inside and not given.exists() else given


def cache_folder(path: str | Path) -> Path:
    """A folder of what may be computed again: `runs/.cache` lies where runs do."""
    given = Path(path).expanduser()
    inside = given.parts[:1] == (DEFAULT,)
    return runs_root().joinpath(*given.parts[1:]) if inside else given
