"""Small files that claim, or unpack to, sizes out of all proportion: refused in one line before memory is taken."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from tessellar.data.image_file import UnreadableImage, decode_image
from tessellar.data.imagenet import prepare_train, prepare_val, read_labels
from tessellar.data.sets.idx import read_idx
from tessellar.data.tars.index import build_index, load_index
from tessellar.data.tars.members import UnreadableMember, decode
from tessellar.data.tars.webdataset_stream import stream_samples
from tessellar.data.token_cache.blocks import Blocks
from tessellar.errors import UserError
from tessellar.npz import open_rows, read_arrays
from tessellar.tensor_files import read_pickle
from tests.hostile.attacks import refused, watched

ZEROS = gzip.compress(bytes(1 << 24))  # 16 MB in 16 kB; one after the other they are one file
MANY = 40


def idx_header(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)


@pytest.mark.parametrize("name", ["x.gz", "x"])
def test_an_idx_header_claims_no_more_than_the_file_holds(tmp_path: Path, name: str) -> None:
    content = idx_header(2**32 - 1, 28, 28) + bytes(5000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with watched(0.25):
        with pytest.raises(UserError, match="x.* is too short for its header, which claims"):
            read_idx(path, axes=3)


def test_no_more_of_an_idx_file_is_unpacked_than_its_header_claims(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx_header(2, 28, 28)) + ZEROS * MANY)
    with watched(0.25):
        with pytest.raises(
            UserError, match=r"1585 bytes or more; its header \(2, 28, 28\) needs 1584"
        ):
            read_idx(path, axes=3)
    path.write_bytes(gzip.compress(idx_header(1 << 24)) + ZEROS)  # as far as it is true it is read
    assert read_idx(path, axes=1).shape == (1 << 24,)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info


def long_name() -> bytes:
    """A header that says that eight gigabytes of name follow."""
    return header("././@LongLink", 8 << 30, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)


def long_entries() -> bytes:
    return header("x", 8 << 30, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)


def sparse() -> bytes:
    """A member of a terabyte, of which one block is stored."""
    info = header("0.png", 512, tarfile.GNUTYPE_SPARSE)
    content = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    content[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    content[483:495] = b"%011o\0" % (1 << 32)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content) + bytes(512)


def sparse_by_entries() -> bytes:
    entries = b""
    for key, value in {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}.items():
        line = f" {key}={value}\n".encode()
        entries += str(len(line) + 2).encode() + line
    info = header("x", len(entries), tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    body = entries + bytes(-len(entries) % 512)
    return info + body + header("0.png", 512).tobuf(tarfile.USTAR_FORMAT) + b"99999999\n".ljust(512)


TARS: dict[str, Callable[[], bytes]] = {
    "a header claims 8589934592 bytes for names": long_name,
    "a header claims 8589934592 bytes for names ": long_entries,
    "is sparse; only whole files are read": sparse,
    "is sparse; only whole files are read ": sparse_by_entries,
}


@pytest.mark.parametrize("line", TARS)
def test_a_tar_claims_no_more_than_pictures_need(tmp_path: Path, line: str) -> None:
    content = TARS[line]() + bytes(10240)
    plain = tmp_path / "t.tar"
    packed = tmp_path / "t.tar.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    line = line.strip()
    refused(lambda: list(stream_samples(str(plain))), line)
    refused(lambda: list(stream_samples(str(packed))), line)
    refused(lambda: build_index(plain), line)
    refused(lambda: read_labels(packed), line)
    labels = tmp_path / "labels.txt"
    labels.write_text("n01440764\n")
    refused(lambda: prepare_val(plain, tmp_path / "out", labels), line)


def test_a_member_of_a_compressed_tar_has_the_size_of_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "t.tar.gz"
    path.write_bytes(gzip.compress(header("0.png", 20 << 30).tobuf(tarfile.GNU_FORMAT)) + ZEROS)
    refused(lambda: list(stream_samples(str(path))), "'0.png' has 21474836480 bytes, more than")
    labels = tmp_path / "labels.txt"
    labels.write_text("n01440764\n")
    refused(lambda: prepare_val(path, tmp_path / "out", labels), "'0.png' has 21474836480 bytes")


def greedy_xz(content: bytes) -> bytes:
    """Packed by xz, and with a header that asks for a dictionary of four gigabytes."""
    packed = bytearray(lzma.compress(content))
    start = 12  # of the header of the first block; its first byte tells its length
    end = start + 4 * (packed[start] + 1)
    place = packed.index(b"\x21\x01", start) + 2  # LZMA2 and one byte of properties
    packed[place] = 40
    packed[end - 4 : end] = struct.pack("<I", zlib.crc32(packed[start : end - 4]))
    return bytes(packed)


def picture_tar() -> bytes:
    stream = io.BytesIO()
    picture = bytes(saved("PNG"))
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(header("0.png", len(picture)), io.BytesIO(picture))
    return stream.getvalue()


def readers(tmp_path: Path, content: bytes) -> list[Callable[[], object]]:
    """Everything that reads a packed tar."""
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    labels = tmp_path / "labels.txt"
    labels.write_text("n01440764\n")
    return [
        lambda: list(stream_samples(str(path))),
        lambda: read_labels(path),
        lambda: prepare_val(path, tmp_path / "out", labels),
        lambda: prepare_train(path, tmp_path / "out"),
    ]


def test_a_dictionary_has_bounds(tmp_path: Path) -> None:
    for read in readers(tmp_path, greedy_xz(picture_tar())):
        refused(read, "t.tar cannot be unpacked: it asks for more than 256 MB of memory")


PACKED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE, preset=6),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_tar_is_unpacked_piece_by_piece(tmp_path: Path, kind: str) -> None:
    """Some hundred bytes of bzip2 hold 128 MB of zeros, a member's: they are never there at once."""
    zeros = PACKED[kind](bytes(1 << 24))
    large = header("0.mp4", 8 << 24).tobuf(tarfile.GNU_FORMAT)
    content = PACKED[kind](large) + zeros * 8 + PACKED[kind](picture_tar())
    path = tmp_path / "t.tar"
    path.write_bytes(content if kind != "lzma" else PACKED[kind](picture_tar()))
    with watched(0.06):
        ((_, fields),) = stream_samples(str(path))
    assert list(fields) == ["png"]


def test_what_unpacks_to_a_thousand_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessellar.data.tars.unpacking.ALWAYS_UNPACKED", 1 << 25)
    large = header("0.mp4", 8 << 30).tobuf(tarfile.GNU_FORMAT)
    content = bz2.compress(large) + bz2.compress(bytes(1 << 24)) * 512
    refused(readers(tmp_path, content)[0], "t.tar unpacks to more than 1032 times its size")


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_tar_that_is_cut_or_damaged_is_one_line(tmp_path: Path, kind: str) -> None:
    content = PACKED[kind](picture_tar())
    for read in readers(tmp_path, content[: len(content) // 2]):
        refused(read, "t.tar breaks off: more was packed than is there")
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0x10
    refused(readers(tmp_path, bytes(damaged))[0], "t.tar.* (cannot be|breaks off|is damaged)")


def test_a_part_of_a_zip_archive_is_packed_as_numpy_and_torch_do(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(4))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = tmp_path / "x.npz"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("mu.npy", array.getvalue())
        line = f"mu.npy is packed by method {method}, which is not read"
        refused(lambda path=path: read_arrays(path, {"mu": ("mu",)}), line)
        refused(lambda path=path: open_rows(path, "mu").__enter__(), line)
        refused(lambda path=path: read_pickle(path), line)


def test_a_kept_index_that_is_no_index_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(picture_tar())
    whole = load_index(path)
    kept = tmp_path / "t.index.npz"
    with np.load(kept) as file:
        arrays = dict(file)
    arrays["meta"] = np.frombuffer(b"[" * 100_000, np.uint8)
    np.savez(kept, **arrays)
    assert load_index(path).names.tolist() == whole.names.tolist()
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("names.npy", npy(600 << 20, b" " * 5000))
    with watched(0.25):
        assert load_index(path).names.tolist() == whole.names.tolist()


def test_other_members_of_any_size_are_passed_over_unread(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with path.open("wb") as file:
        file.write(header("0.mp4", 400 << 20).tobuf(tarfile.GNU_FORMAT))
        file.seek(400 << 20, io.SEEK_CUR)  # a hole, which takes no room
        file.write(header("0.png", len(picture.getvalue())).tobuf(tarfile.GNU_FORMAT))
        file.write(picture.getvalue().ljust(512, b"\0") + bytes(1024))
    with watched(0.25):
        ((_, fields),) = stream_samples(str(path))
    assert list(fields) == ["png"]


def npy(length: int, text: bytes = b"") -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + text


def test_headers_of_arrays_claim_no_more_than_the_arrays_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", npy(600 << 20, b" " * 5000))
    refused(lambda: read_arrays(path, {"mu": ("mu",)}), "mu has a header of 629145600 bytes")
    with watched(), pytest.raises(UserError, match="mu has a header of"):
        with open_rows(path, "mu"):
            pass
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (10**12,)}
    )
    with watched(), pytest.raises(UnreadableMember, match="0.npy has shape .1000000000000"):
        decode("npy", stream.getvalue() + bytes(9), "0.npy")


def test_packed_zeros_are_no_torch_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"x": torch.zeros(1 << 21)}, whole)
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert path.stat().st_size < 100_000
    refused(lambda: read_pickle(path), "packed.pt would take 83.* bytes of memory")
    assert len(read_pickle(whole)["x"]) == 1 << 21


def test_a_damaged_block_of_an_unfinished_cache_is_one_line(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, 4, 4)
    arrays = {"labels": np.zeros(4), "sums": np.zeros(4), "captions": np.zeros(0, np.uint8)}
    np.savez_compressed(blocks.path(0), **arrays, ends=np.zeros(4), corrupt=np.int64(0))
    content = bytearray(blocks.path(0).read_bytes())
    content[60:80] = b"\xff" * 20  # the packed bytes themselves
    blocks.path(0).write_bytes(content)
    refused(lambda: blocks.read(0), "block_000000.npz is damaged .*: remove it and")


def saved(form: str, **options: object) -> bytearray:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 80, 200)).save(stream, form, **options)
    return bytearray(stream.getvalue())


def jpeg() -> bytes:
    content = saved("JPEG")
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(content)


def gif() -> bytes:
    content = saved("GIF")
    content[6:10] = struct.pack("<HH", 65000, 65000)
    return bytes(content)


def bmp() -> bytes:
    content = saved("BMP")
    content[18:26] = struct.pack("<ii", 65000, 65000)
    return bytes(content)


def tiff() -> bytes:
    content = saved("TIFF")
    for tag in (256, 257):  # width and length
        place = content.index(struct.pack("<H", tag))
        content[place + 2 : place + 12] = struct.pack("<HII", 4, 1, 65000)
    return bytes(content)


def webp() -> bytes:
    """An extended header with the largest canvas, before a picture of 16 x 16."""
    content = saved("WEBP", lossless=True)
    side = (16383).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side
    body = b"WEBP" + extended + bytes(content[12:])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def avif() -> bytes:
    """The extents of the picture and of its coded items."""
    content = saved("AVIF")
    place = content.index(b"ispe") + 8
    content[place : place + 8] = struct.pack(">II", 60000, 60000)
    return bytes(content)


PICTURES = {"JPEG": jpeg, "GIF": gif, "BMP": bmp, "TIFF": tiff, "WEBP": webp, "AVIF": avif}


@pytest.mark.parametrize("form", [f for f in PICTURES if f != "AVIF" or features.check("avif")])
def test_a_picture_of_a_kilobyte_takes_no_gigabytes(form: str) -> None:
    content = PICTURES[form]()
    assert len(content) < 5000
    with watched(0.75), pytest.raises(UnreadableImage):
        decode_image(content, "x")
