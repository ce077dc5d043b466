"""Members of WebDataset tars: which are read, and how. Only images, json, txt and cls are decoded,
and npy on request.

A sample is all members with one name up to the first dot of its last part; the rest, in lower case,
is the field. Text is read as `captions.py` says. Nothing is ever unpickled: a member that would
need it is refused by name, as is a name that leads out of the tar's folder. Members of any other
kind are left unread, and so are hidden and system files.
"""

import io
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tessellar.data.captions import UnreadableText, decode_text, read_captions
from tessellar.data.files import is_junk
from tessellar.data.image_file import EXTENSIONS, decode_image
from tessellar.errors import UserError
from tessellar.npy import read_header
from tessellar.plain_data import parse_json

IMAGE_FIELDS = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
FIELDS = (*IMAGE_FIELDS, "json", "txt", "cls", "npy")
PICKLES = ("pth", "pt", "ckpt", "pkl", "pickle", "pyd", "joblib", "dill")
MAX_CLASSES = 1_000_000


class UnreadableMember(UserError):
    """A member whose content is not what its name says; the sample can be left out."""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member's name; None for what is not read.

    Raises UserError for a name with `..` or from the root, and for a pickle.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"member {name!r} leads out of the tar: such a file is not opened")
    if any(is_junk(part) for part in path.parts if part != "."):
        return None
    stem, _, field = path.name.partition(".")
    if field.lower().rpartition(".")[2] in PICKLES:
        raise UserError(
            f"member {name!r} is a pickle, which can hold code; only {', '.join(FIELDS)} are read"
        )
    if not stem or field.lower() not in FIELDS:
        return None
    return str(path.parent / stem), field.lower()


def decode(field: str, content: bytes, name: str) -> Any:
    """The content of a member: an RGB image, JSON, text, an int (cls), or an array (npy, without
    pickles).

    Raises UnreadableImage or UnreadableMember naming the member.
    """
    if field in IMAGE_FIELDS:
        return decode_image(content, name)
    try:
        match field:
            case "json":
                return parse_json(decode_text(content, name), name)
            case "txt":
                return decode_text(content, name)
            case "cls":
                return int(decode_text(content, name))
            case "npy":
                read_header(io.BytesIO(content), name, len(content))
                return np.load(io.BytesIO(content), allow_pickle=False)
    except UserError as error:
        raise UnreadableMember(str(error)) from error
    except (ValueError, OSError, EOFError, RecursionError, MemoryError) as error:
        raise UnreadableMember(f"{name} is not {field}: {error or type(error).__name__}") from error
    raise UserError(f"{name}: field {field!r} is not read; only {', '.join(FIELDS)} are")


def label_of(fields: dict[str, Any], key: str, name: str) -> int | None:
    """The class of a sample's decoded `fields`: `cls`, or entry `key` of its JSON; None where it
    has none.

    Raises UnreadableMember unless it is in [0, MAX_CLASSES).
    """
    label = fields["cls"] if "cls" in fields else _entry(fields, key)
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < MAX_CLASSES:
        raise UnreadableMember(
            f"{name}: the class is {repr(label)[:40]}; it must be a whole number, 0 or more"
        )
    return label


def captions_of(fields: dict[str, Any], key: str, name: str) -> tuple[str, ...]:
    """The captions of a sample's decoded `fields`: `txt`, or a text or list of texts at `key` of
    its JSON.

    Empty where it has none; raises UnreadableMember where one is no text.
    """
    try:
        return read_captions(fields.get("txt"), name) or read_captions(_entry(fields, key), name)
    except UnreadableText as error:
        raise UnreadableMember(str(error)) from error


def _entry(fields: dict[str, Any], key: str) -> Any:
    entries = fields.get("json")
    return entries.get(key) if isinstance(entries, dict) else None
