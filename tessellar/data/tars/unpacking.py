"""Packed tars (gzip, bzip2, xz) as streams that are unpacked a bounded piece at a time.

`tarfile` unpacks whatever it has read of a stream at once: ten kilobytes of bzip2 may be ten
gigabytes, and the header of an xz stream may ask for a dictionary of four. Here no more is unpacked
than was asked for, a dictionary has a limit, and so has what a small file may become.
"""

import bz2
import io
import lzma
import zlib
from typing import BinaryIO, Protocol

from tessellar.errors import UserError

PIECE = 1 << 16  # packed bytes that are read at once
LARGEST_MEMORY = 1 << 28  # of an xz decoder: `xz -9` needs 65 MB
# A file may become this many times its size, which gzip cannot exceed; and any file this large.
MOST_UNPACKED = 1032
ALWAYS_UNPACKED = 1 << 30


class Decompressor(Protocol):
    """What the decompressors of Python's bz2 and lzma share."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class Gzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        content = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full answer may have left something behind, in zlib itself too.
        self.needs_input = len(content) < max_length and not self._inner.unconsumed_tail
        return content


def decompressor_of(begin: bytes) -> Decompressor | None:
    """The decompressor of a file that begins so; None for one that is not packed."""
    if begin.startswith(b"\x1f\x8b\x08"):
        return Gzip()
    if begin.startswith(b"BZh") and begin[4:10] == b"1AY&SY":
        return bz2.BZ2Decompressor()
    if begin.startswith((b"\xfd7zXZ\0", b"\x5d\x00\x00\x80")):
        return lzma.LZMADecompressor(memlimit=LARGEST_MEMORY)
    return None


BEGIN = 10  # bytes that tell the packing


class Unpacked:
    """Reads a binary stream, unpacked where it is packed; `name` is said in errors.

    Packed streams that follow one another are one, as `pbzip2` writes them.
    """

    def __init__(self, packed: BinaryIO, name: str) -> None:
        self._packed = packed
        self._name = name
        self._begin = packed.read(BEGIN)
        self._decompressor = decompressor_of(self._begin)
        self._packed_size = len(self._begin)
        self._size = 0
        self._ended = False

    @property
    def is_packed(self) -> bool:
        return self._decompressor is not None

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end.

        Raises UserError where what is packed is damaged, breaks off, or is out of all proportion.
        """
        if self._decompressor is None:
            begin = self._begin[:size]
            self._begin = self._begin[size:]
            return begin + self._packed.read(size - len(begin))
        content = io.BytesIO()
        while content.tell() < size and not self._ended:
            content.write(self._next(self._decompressor, size - content.tell()))
        return content.getvalue()

    def check_rest(self) -> None:
        """Read to the end, where a packed stream holds its checksum."""
        while self.is_packed and self.read(PIECE):
            pass

    def _next(self, decompressor: Decompressor, size: int) -> bytes:
        """At most `size` bytes more, maybe none."""
        if decompressor.eof:
            self._go_on(decompressor.unused_data)
            return b""
        packed = b""
        if decompressor.needs_input:
            packed = self._begin or self._more()
            self._begin = b""
            if not packed:
                raise UserError(f"{self._name} breaks off: more was packed than is there")
        try:
            content = decompressor.decompress(packed, size)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{self._name} cannot be unpacked: {in_words(error)}") from error
        self._size += len(content)
        if self._size > ALWAYS_UNPACKED + MOST_UNPACKED * self._packed_size:
            raise UserError(
                f"{self._name} unpacks to more than {MOST_UNPACKED} times its size: no pictures do"
            )
        return content

    def _more(self) -> bytes:
        packed = self._packed.read(PIECE)
        self._packed_size += len(packed)
        return packed

    def _go_on(self, left: bytes) -> None:
        """Begin with the packed stream that follows; anything else that follows is left."""
        self._begin = left + self._more()
        following = decompressor_of(self._begin)
        if following is None:
            self._ended = True
        else:
            self._decompressor = following


def in_words(error: Exception) -> str:
    """What a decompressor says, and of a limit of ours what would be right."""
    if "Memory usage limit" in str(error):
        return (
            f"it asks for more than {LARGEST_MEMORY >> 20} MB of memory; `xz -9` needs 65, so pack "
            "it again"
        )
    return str(error) or type(error).__name__
