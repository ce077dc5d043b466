"""Where the members of one uncompressed tar are: read once from its headers, then kept beside it as
`<name>.index.npz`.

With the offsets a tar is a map-style set: any sample at once, exact shuffling and resume. The index
is made anew when the tar's size or time changes, and stays in memory where the folder cannot be
written. Classes and captions are read while indexing, so that mistakes show before a run: a sample
whose text cannot be read is left out, and `left_out` says why.
"""

import json
import logging
import os
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tessellar.data.tars.headers import Header, RefusedHeader
from tessellar.data.tars.members import (
    FIELDS,
    IMAGE_FIELDS,
    UnreadableMember,
    captions_of,
    decode,
    label_of,
    split_name,
)
from tessellar.errors import UserError
from tessellar.npz import read_arrays
from tessellar.plain_data import parse_json

log = logging.getLogger(__name__)
VERSION = 3
BLOCK = 512
MAX_TEXT = 1 << 24  # bytes of a json, txt or cls member
Place = tuple[int, int]  # offset and size


@dataclass(frozen=True)
class Keys:
    """Entries of a sample's JSON that hold its class, the class's name, and its caption."""

    label: str = "class"
    class_name: str = "class_name"
    caption: str = "caption"


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar; sample i has the members in rows `starts[i]` to `starts[i + 1]`."""

    path: Path
    names: np.ndarray  # bytes [N], without the field
    starts: np.ndarray  # int64 [N + 1]
    fields: np.ndarray  # uint8 [M], a place in FIELDS
    offsets: np.ndarray  # int64 [M]
    sizes: np.ndarray  # int64 [M]
    labels: np.ndarray  # int64 [N], -1 for none
    captioned: np.ndarray  # uint8 [N], 1 for a sample with a caption
    class_names: dict[int, str]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, sample: int) -> str:
        return f"{self.path}:{self.name(sample)}"

    def name(self, sample: int) -> str:
        return self.names[sample].decode(errors="replace")

    def members(self, sample: int) -> dict[str, Place]:
        """Place of each field of a sample."""
        found = {}
        for row in range(self.starts[sample], self.starts[sample + 1]):
            found[FIELDS[self.fields[row]]] = (int(self.offsets[row]), int(self.sizes[row]))
        return found

    def read(self, sample: int, field: str) -> bytes:
        """The bytes of one member; fewer than it should have where the tar was cut off since."""
        offset, size = self.members(sample)[field]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def image_sizes(self) -> np.ndarray:
        """Bytes of the image of each sample, int64 [N]."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        # FIELDS begins with IMAGE_FIELDS.
        rows = np.flatnonzero(self.fields < len(IMAGE_FIELDS))
        # A sample's image is of its first field.
        ranked = rows[np.lexsort((self.fields[rows], owners[rows]))]
        _, first = np.unique(owners[ranked], return_index=True)
        return self.sizes[ranked[first]]

    def text_sizes(self) -> np.ndarray:
        """Bytes of each member that is text, int64, in the order of the tar."""
        return self.sizes[np.isin(self.fields, [FIELDS.index("txt"), FIELDS.index("json")])]

    def image_field(self, sample: int) -> str:
        return next(field for field in IMAGE_FIELDS if field in self.members(sample))


def load_index(path: Path, keys: Keys = Keys()) -> TarIndex:  # noqa: B008
    """The index kept beside the tar, or a new one, which is then kept; raises UserError for a tar
    it cannot trust.
    """
    stat = path.stat()
    facts = {"version": VERSION, "size": stat.st_size, "time": stat.st_mtime_ns, "keys": vars(keys)}
    kept = path.with_suffix(".index.npz")
    index = _load(path, kept, facts)
    if index is None:
        index = build_index(path, keys)
        _keep(index, kept, facts)
    return index


def build_index(path: Path, keys: Keys = Keys()) -> TarIndex:  # noqa: B008
    """Read all headers, and the text, of a tar."""
    with path.open("rb") as file:
        samples: dict[str, dict[str, Place]] = {}
        for name, place in plain_files(path, file):
            try:
                parts = split_name(name)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if parts is None:
                continue
            key, field = parts
            if field in samples.setdefault(key, {}):
                raise UserError(f"{path} holds {key}.{field} twice")
            samples[key][field] = place
        return collect(path, file, samples, keys)


def plain_files(path: Path, file: BinaryIO) -> Iterator[tuple[str, Place]]:
    """Names and places of the plain files of a tar; raises UserError for what is damaged, and for
    links.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the tar
                if member.offset_data < end or member.size < 0:
                    raise UserError(
                        f"{path}: member {member.name!r} lies inside another; the tar is damaged"
                    )
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UserError(
                        f"{path}: member {member.name!r} is a link or a device; only files are read"
                    )
                end = member.offset_data + member.size
                yield member.name, (member.offset_data, member.size)
            file.seek(tar.offset)
    except RefusedHeader as error:
        raise UserError(f"{path}: {error}") from error
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not an uncompressed tar ({error})") from error
    # Python's reader takes a damaged header for the end; a whole tar ends in a block of zeros.
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(
            f"{path} is truncated or damaged at byte {tar.offset}: there is no end mark"
        )


def collect(
    path: Path, file: BinaryIO, samples: dict[str, dict[str, Place]], keys: Keys
) -> TarIndex:
    names: list[bytes] = []
    starts = [0]
    rows: list[tuple[int, int, int]] = []
    labels: list[int] = []
    captioned: list[bool] = []
    class_names: dict[int, str] = {}
    left_out: list[str] = []
    for key, members in samples.items():
        where = f"{path}:{key}"
        try:
            if members.keys().isdisjoint(IMAGE_FIELDS):
                raise UnreadableMember(f"{where} has no image")
            label, name, has_caption = _text(file, members, keys, where)
        except UnreadableMember as error:
            left_out.append(str(error))
            continue
        names.append(os.fsencode(key))
        for field, place in members.items():
            rows.append((FIELDS.index(field), *place))
        starts.append(len(rows))
        labels.append(label)
        captioned.append(has_caption)
        if name is not None and class_names.setdefault(label, name) != name:
            raise UserError(
                f"{where}: class {label} is {name!r} here and {class_names[label]!r} before"
            )
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return TarIndex(
        path,
        names=np.array(names, dtype=bytes),
        starts=np.array(starts, dtype=np.int64),
        fields=table[:, 0].astype(np.uint8),
        offsets=table[:, 1].copy(),
        sizes=table[:, 2].copy(),
        labels=np.array(labels, dtype=np.int64),
        captioned=np.array(captioned, dtype=np.uint8),
        class_names=class_names,
        left_out=tuple(left_out),
    )


class _Text(NamedTuple):
    label: int  # -1 for none
    class_name: str | None
    has_caption: bool


def _text(file: BinaryIO, members: dict[str, Place], keys: Keys, where: str) -> _Text:
    """What the text of a sample says; raises UnreadableMember also for a caption that cannot be
    read.
    """
    decoded: dict[str, Any] = {}
    for field in ("json", "cls", "txt"):
        if field in members:
            offset, size = members[field]
            if size > MAX_TEXT:
                raise UnreadableMember(f"{where}.{field} has {size} bytes, too many for text")
            file.seek(offset)
            decoded[field] = decode(field, file.read(size), f"{where}.{field}")
    has_caption = bool(captions_of(decoded, keys.caption, where))
    label = label_of(decoded, keys.label, where)
    entries = decoded.get("json")
    name = entries.get(keys.class_name) if isinstance(entries, dict) else None
    if label is None:
        return _Text(-1, None, has_caption)
    return _Text(label, name if isinstance(name, str) else None, has_caption)


def _keep(index: TarIndex, kept: Path, facts: dict[str, Any]) -> None:
    """Write the index beside its place and move it there; a folder that cannot be written is no
    mistake.
    """
    names = {str(label): name for label, name in index.class_names.items()}
    meta = json.dumps({**facts, "class_names": names, "left_out": index.left_out})
    stage = kept.with_name(f".{kept.stem}.{uuid.uuid4().hex[:8]}.npz")
    try:
        arrays = _arrays_of(index)
        np.savez(stage, meta=np.frombuffer(meta.encode(), dtype=np.uint8), **arrays)
        os.replace(stage, kept)
    except OSError as error:
        stage.unlink(missing_ok=True)
        log.info("the index of %s is not kept (%s)", index.path, error)


_ARRAYS = {
    "names": "S",
    "starts": "i",
    "fields": "u",
    "offsets": "i",
    "sizes": "i",
    "labels": "i",
    "captioned": "u",
}


def _load(path: Path, kept: Path, facts: dict[str, Any]) -> TarIndex | None:
    """The kept index, or None where there is none, or one that does not belong to this tar or makes
    no sense.
    """
    try:
        file = read_arrays(kept, {name: (name,) for name in (*_ARRAYS, "meta")})
        arrays = {name: file[name] for name in _ARRAYS}
        meta = parse_json(file["meta"].tobytes(), str(kept))
        if any(meta[key] != value for key, value in facts.items()):
            return None
        names = {int(label): str(name) for label, name in meta["class_names"].items()}
        index = TarIndex(
            path, **arrays, class_names=names, left_out=tuple(map(str, meta["left_out"]))
        )
        return index if makes_sense(index, facts["size"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return None


def _arrays_of(index: TarIndex) -> dict[str, Any]:
    return {name: getattr(index, name) for name in _ARRAYS}


def makes_sense(index: TarIndex, size: int) -> bool:
    n = len(index.names)
    m = len(index.fields)
    for name, array in _arrays_of(index).items():
        if array.ndim != 1 or array.dtype.kind != _ARRAYS[name]:
            return False
    return (
        len(index.starts) == n + 1
        and len(index.labels) == len(index.captioned) == n
        and len(index.offsets) == len(index.sizes) == m
        and index.starts[0] == 0
        and index.starts[-1] == m
        and bool((np.diff(index.starts) > 0).all())
        and bool((index.fields < len(FIELDS)).all())
        and bool((index.offsets >= 0).all() and (index.sizes >= 0).all())
        and bool((index.offsets + index.sizes <= size).all())
    )
