"""The files of a cache of tokens.

    header.json       what made it: tokenizer, layout, views, data, counts
    tokens.npy        [N, views, ...], see token_storage.py
    labels.npy        int64 [N]
    captions.bin      all captions in UTF-8, one image behind the other; captions.npy says where each image's end, and a
                      zero byte lies between several of one image

The arrays are mapped into memory, never read as a whole, and never hold pickles.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tessellar.data.token_cache.storage import Storage, is_storage_of
from tessellar.errors import UserError
from tessellar.plain_data import read_json
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Layout

HEADER = "header.json"
TOKENS = "tokens.npy"
LABELS = "labels.npy"
CAPTIONS = "captions.bin"
ENDS = "captions.npy"
CHECKSUMS = "checksums.npy"
FORMAT = "tessellar token cache"
VERSION = 1
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Header:
    """What a cache says of itself.

    `tokenizer` is its fingerprint, `corrupt` counts images that others stand for, `checksums` holds
    the CRC-32 of the small files (None in caches of older versions).
    """

    data: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    tokenizer: str
    tokenizer_config: dict[str, Any]
    layout: dict[str, Any]
    storage: Storage
    precision: Precision
    count: int
    views: int
    captions: bool
    corrupt: int = 0
    checksums: dict[str, int] | None = None
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def token_layout(self) -> Layout:
        layout = build(self.layout, Layout)
        if not isinstance(layout, Layout):
            raise ValueError(f"the layout is a {type(layout).__name__}")
        return layout


def read_header(folder: str | Path) -> Header:
    """The header of a cache; raises UserError for anything else."""
    path = Path(folder) / HEADER
    if not path.is_file():
        raise UserError(
            f"{folder} is not a complete cache (it has no {HEADER}); make one with convert.py cache"
        )
    facts: Any = read_json(path)
    if (
        not isinstance(facts, dict)
        or facts.get("format") != FORMAT
        or facts.get("version") != VERSION
    ):
        raise UserError(f"{path} is not of a {FORMAT} of version {VERSION}")
    try:
        header = _header(facts)
        fits = is_storage_of(header.storage, header.token_layout)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # entries of any other kind
        raise UserError(f"{path} is not a header as it should be ({error!r})") from error
    if not fits or header.count < 1 or header.views < 1:
        raise UserError(
            f"{path} contradicts itself: {header.count} images of {header.token_layout} in {header.storage}"
        )
    return header


def _header(facts: dict[str, Any]) -> Header:
    storage = facts["storage"]
    facts["storage"] = Storage(storage["kind"], storage["dtype"], tuple(map(int, storage["shape"])))
    facts["class_names"] = tuple(map(str, facts["class_names"]))
    height, width = facts["image_size"]
    facts["image_size"] = (int(height), int(width))
    facts["count"], facts["views"] = int(facts["count"]), int(facts["views"])
    if facts.get("checksums") is not None:
        facts["checksums"] = {str(name): int(value) for name, value in facts["checksums"].items()}
    return Header(**facts)


def crc_of(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def crc_of_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each of B rows, uint32 [B]."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


def open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An npy file mapped into memory; raises UserError unless it is whole and has this shape and
    type.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # headers that claim any shape raise every kind
        raise UserError(
            f"{path} is missing, truncated or no npy file ({error}); make the cache anew"
        ) from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}; the header says {dtype} {shape}"
        )
    return array
