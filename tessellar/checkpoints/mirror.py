"""Files of published checkpoints on this machine: in a mirror, in the hub's cache, or downloaded.

The mirror is the folder that TESSELLAR_MIRROR names; files lie in it as on the hub,
`OWNER/REPO/FILE`, those that are not on the hub as `SYSTEM/FILE`.
"""

import os
from pathlib import Path
from typing import NoReturn

from tessellar.checkpoints.hub import HubFile, fetch_file
from tessellar.checkpoints.zoo import UNKNOWN, Published
from tessellar.errors import UserError

MIRROR = "TESSELLAR_MIRROR"


def file_of(checkpoint: Published) -> Path:
    """Its official file, from the mirror, the hub's cache or the hub, with what has to lie beside it.

    Raises UserError that says what to download, and to where.
    """
    system, repository = checkpoint.system, checkpoint.repository
    if checkpoint.file == UNKNOWN:
        raise UserError(
            f"{checkpoint.name}: the name of its file in {repository} is not known here; look it up and give it, "
            f"`convert.py import {system} hub:{repository}/FILE --out FOLDER`"
        )
    for other in checkpoint.beside:
        _fetch(checkpoint, other)
    return _fetch(checkpoint, checkpoint.file)


def _fetch(checkpoint: Published, file: str) -> Path:
    if checkpoint.on_hub:
        return fetch_mirrored(HubFile(checkpoint.repository, file), checkpoint.name)
    place = Path(checkpoint.system, file)
    note = f" ({checkpoint.note})" if checkpoint.note else ""
    return mirrored(place) or _cannot(
        f"{checkpoint.name} needs {file} of arXiv {checkpoint.arxiv}, whose address on the hub is not known here{note}",
        place,
    )


def fetch_mirrored(file: HubFile, wanted_by: str = "") -> Path:
    """A file of the hub: from the mirror, else by the hub's library, which looks into its cache.

    Raises UserError that says what to download, and to where.
    """
    place = Path(file.repository, file.file)
    found = mirrored(place)
    if found is not None:
        return found
    try:
        return fetch_file(file)
    except UserError as error:
        reason = f"{wanted_by} needs {error}" if wanted_by else str(error)
    _cannot(reason, place)  # outside, so that a traceback in Python holds this one error


def local_file(text: str) -> str:
    """The path of a file: itself, or that of `hub:OWNER/REPO[@REVISION]/FILE` once it is here."""
    if not text.startswith("hub:"):
        return text
    return str(fetch_mirrored(HubFile.read(text)))


def mirrored(place: Path) -> Path | None:
    """A file of the mirror, by its path below it; None where there is no mirror, or no such file."""
    root = os.environ.get(MIRROR)
    if not root:
        return None
    file = Path(root).expanduser() / place
    return file if file.is_file() else None


def _cannot(reason: str, place: Path) -> NoReturn:
    root = os.environ.get(MIRROR)
    there = Path(root or f"${MIRROR}") / place
    raise UserError(f"{reason}: download it to {there}{'' if root else f' and set {MIRROR}'}")
