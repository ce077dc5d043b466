"""Exports on the Hugging Face hub: only the three files of an export are ever fetched, so no pickle
can come along.
"""

import re
from pathlib import Path

from tessellar.checkpoints.export import CARD, CONFIG, WEIGHTS
from tessellar.errors import UserError
from tessellar.places import DEFAULT

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{hub_id} is no local path, and the hub did not give it either ({reason})"
        ) from error
    return Path(folder)
