"""Names of shards: `train-{0000..0127}.tar`, `train-*.tar`, a folder of tars, or a list of such."""

import glob
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from tessellar.errors import UserError, check_is_file


def expand_braces(spec: str | Sequence[str]) -> list[str]:
    """Braces written out, everything else as it is; raises UserError for braces that do not match."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    names: list[str] = []
    try:
        for each in specs:
            names += map(str, braceexpand(str(each)))
        return names
    except ValueError as error:
        raise UserError(
            f"{spec}: braces do not match; write for example train-{{0000..0127}}.tar"
        ) from error


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """The local tars of `spec`, sorted within each part; raises UserError where one is missing or
    comes twice.
    """
    found: list[Path] = []
    for name in expand_braces(spec):
        path = Path(name).expanduser()
        matches = (
            sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
        )
        matches = matches or ([path] if path.is_file() else [])
        for match in matches:
            check_is_file(match)
        if not matches:
            raise UserError(f"{name}: there is no such tar, and no folder that holds tars")
        found += matches
    twice = sorted({str(path) for path in found if found.count(path) > 1})
    if twice:
        raise UserError(f"{twice[0]} is named twice in {spec}")
    return found
