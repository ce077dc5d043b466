"""The Hugging Face hub: exports, of which only their three files are ever fetched, so that no pickle can
come along; and single official files that a user names, for the importers.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from tessellar.checkpoints.export import CARD, CONFIG, WEIGHTS
from tessellar.checkpoints.zoo import zoo
from tessellar.errors import UserError
from tessellar.places import DEFAULT
from tessellar.protocol.nearest import nearest

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
HUB_FILE = re.compile(
    r"hub:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?/(?P<file>[^/\\].*)"
)
FILE_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".yaml")


def is_hub_id(text: str) -> bool:
    """Whether `text` reads as `owner/name[@revision]` rather than as a path that was mistyped."""
    owner = text.split("/")[0]
    return (
        bool(HUB_ID.fullmatch(text))
        and not text.endswith(FILE_SUFFIXES)
        and owner != DEFAULT  # the folder of runs, which may lie elsewhere
        and not Path(owner).is_dir()
    )


def fetch(hub_id: str) -> Path:
    """Folder of the export `owner/name[@revision]`, downloaded or cached; raises UserError where it
    cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    match = HUB_ID.fullmatch(hub_id)
    assert match is not None
    try:
        folder = huggingface_hub.snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=[CONFIG, WEIGHTS, CARD]
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        hint = nearest(hub_id, zoo(), listed=0)  # a published name, mistyped
        raise UserError(
            f"{hub_id} is no local path, and the hub did not give it either ({_reason(error)}){hint}"
        ) from error
    return Path(folder)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the hub, `hub:OWNER/REPO[@REVISION]/FILE`."""

    repository: str
    file: str
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> "HubFile":
        """Of its text; raises UserError for one of another form."""
        match = HUB_FILE.fullmatch(text)
        if match is None or ".." in match["file"].split("/"):
            raise UserError(f"{text!r} is no file of the hub: hub:OWNER/REPO[@REVISION]/FILE")
        return cls(match["repo"], match["file"], match["revision"])


def fetch_file(file: HubFile) -> Path:
    """Where a file of the hub lies in its library's cache, downloaded or from before.

    Raises UserError where it cannot be had; offline the cache alone is looked into.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # of httpx or httpx2, by its version
    )

    where = (file.repository, file.file)
    try:
        if huggingface_hub.try_to_load_from_cache(*where, revision=file.revision) is None:
            # Asked once: without a network the download would ask six times, for half a minute.
            address = huggingface_hub.hf_hub_url(*where, revision=file.revision)
            huggingface_hub.get_hf_file_metadata(address)
        path = huggingface_hub.hf_hub_download(*where, revision=file.revision)
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"{file.file} of {file.repository}, which is not in the hub's cache and which the hub did not give "
            f"({_reason(error)})"
        ) from error
    return Path(path)


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return shorten(line, width=160, placeholder=" ...")
