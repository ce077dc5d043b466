"""Files below a folder that are images, by their names; what is left out is counted, never dropped in
silence.

Hidden files and folders, and those that systems put beside pictures (macOS's `._x.png` and
`__MACOSX`, thumbnails of network drives, recycle bins), are no part of a data set and not counted.
Links to folders are followed, but not in circles.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tessellar.data.image_file import EXTENSIONS

log = logging.getLogger(__name__)

JUNK = frozenset(
    (
        "__MACOSX",
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "desktop.ini",
    )
)


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name in JUNK


def is_image(name: str) -> bool:
    """Whether a file of this name is read."""
    return name.lower().endswith(EXTENSIONS)


def plain_files(folder: str | Path) -> list[str]:
    """Names of the files right in a folder that are not junk, sorted; no pipes, no devices."""
    with os.scandir(folder) as entries:
        names = []
        for entry in entries:
            if is_junk(entry.name):
                continue
            # A link that leads nowhere counts: it is for the reader to name it as unreadable.
            if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                names.append(entry.name)
        return sorted(names)


def sub_folders(folder: str | Path) -> list[str]:
    """Names of the folders right in a folder that are not junk, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not is_junk(e.name) and e.is_dir())


def files_below(folder: str | Path) -> list[str]:
    """Paths, relative to `folder`, of all its files that are not junk, sorted."""
    return sorted(_walk(str(folder), "", frozenset()))


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    facts = os.stat(folder)
    here = (facts.st_dev, facts.st_ino)
    if here in above:  # a link to a folder that this one lies in
        return
    for name in plain_files(folder):
        yield below + name
    for name in sub_folders(folder):
        yield from _walk(os.path.join(folder, name), f"{below}{name}/", above | {here})


@cache  # a set is listed several times in a run, and said once
def tell_left_out(root: str, total: int, left_out: tuple[str, ...]) -> None:
    """Say in one line how many of the `total` files below `root` are not read, by their endings."""
    if left_out:
        endings = Counter(os.path.splitext(file)[1].lower() or "no ending" for file in left_out)
        counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(5))
        log.warning(
            "%s: %d of %d files are not read (%s); %s are",
            root,
            len(left_out),
            total,
            counts,
            ", ".join(EXTENSIONS),
        )
