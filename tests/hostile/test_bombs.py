"""Small files that claim, or unpack to, sizes out of all proportion: refused in one line before memory is taken."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from tessellar.data.image_file import UnreadableImage, decode_image
from tessellar.data.imagenet import prepare_val, read_labels
from tessellar.data.sets.idx import read_idx
from tessellar.data.tars.index import build_index
from tessellar.data.tars.members import UnreadableMember, decode
from tessellar.data.tars.webdataset_stream import stream_samples
from tessellar.data.token_cache.blocks import Blocks
from tessellar.errors import UserError
from tessellar.evaluation.npz import open_rows, read_arrays
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
    refused(lambda: blocks.read(0), "block_000000.npz is damaged")


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
