"""Pictures and sets of pictures that are damaged, foreign or something else: skipped and counted, refused in one line,
or named with their count; never a traceback, a hang or a silent loss."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from tessellar.data import ImageFolderData
from tessellar.data.files import tell_left_out
from tessellar.data.image_file import FORMATS, UnreadableImage, decode_image, read_image
from tessellar.data.sets.image_folder import ImageFolder, list_folder
from tessellar.data.tars.members import split_name
from tessellar.data.tars.webdataset_stream import WebDatasetStreamData, stream_samples
from tessellar.data.tars.webdataset_tar import WebDatasetData
from tessellar.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def encoded(form: str, pixels: np.ndarray = NOISE, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def avif_without_payload() -> bytes:
    """A whole header before zeros: the decoder raises RuntimeError."""
    if not features.check("avif"):
        return b"no AVIF here"
    content = encoded("AVIF")
    start = content.index(b"mdat") + 8
    return content[:start] + bytes(len(content) - start)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def thin_png(width: int, height: int, pixels: int | None = None) -> bytes:
    """A few kB of grey pixels, of any shape; or fewer of them than the header claims."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (width + 1) if pixels is None else pixels))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def png_with(kind: bytes, content: bytes) -> bytes:
    """A sound picture with one more chunk behind its header, whose checksum is right."""
    whole = encoded("PNG")
    return whole[:33] + chunk(kind, content) + whole[33:]


def tiff_of_many_entries() -> bytes:
    """A directory that claims 65,535 tags of a gigabyte each."""
    entry = struct.pack("<HHII", 270, 2, 1 << 30, 8)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 65535) + entry * 40


BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no image",
    "html": lambda: b"<html><body>404 Not Found</body></html>",
    "avif": avif_without_payload,
    "dds": lambda: b"DDS " + struct.pack("<IIII", 124, 0, 8, 8) + bytes(108),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "icns": lambda: b"icns" + struct.pack(">I", 8),
    "pcx": lambda: b"\x0a\x05\x01\x08" + bytes(124),
    "psd": lambda: b"8BPS\0\1" + bytes(20),
    "fits": lambda: b"SIMPLE  =                    T".ljust(2880),
    "wmf": lambda: b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "tall": lambda: thin_png(1, 2_000_000),
    "wide": lambda: thin_png(2_000_000, 1),
    "a bomb": lambda: thin_png(20_000, 20_000, pixels=100),
    "no pixels": lambda: png_with(b"IEND", b"")[:45],
    "cut png": lambda: encoded("PNG")[:300],
    "cut jpeg": lambda: encoded("JPEG")[:300],
    "cut gif": lambda: encoded("GIF")[:300],
    "cut webp": lambda: encoded("WEBP")[:300],
    "cut bmp": lambda: encoded("BMP")[:300],
    "cut tiff": lambda: encoded("TIFF")[:300],
    "tiff of many entries": tiff_of_many_entries,
    "png with a text of gigabytes": lambda: png_with(
        b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26))
    ),
    "float tiff of another range": lambda: encoded("TIFF", np.full((9, 9), 7.5, np.float32)),
    "float tiff of nan": lambda: encoded("TIFF", np.full((9, 9), np.nan, np.float32)),
    "negative float tiff": lambda: encoded("TIFF", np.full((9, 9), -0.5, np.float32)),
    "int32 tiff": lambda: encoded("TIFF", np.full((9, 9), 7, np.int32)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named_in_one_line(name: str) -> None:
    with pytest.raises(UnreadableImage, match="cannot read the image a.tar:x.png: .") as caught:
        decode_image(BAD[name](), "a.tar:x.png")
    assert "\n" not in str(caught.value)


def test_bad_pictures_are_skipped_and_counted_like_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(BAD):
        (tmp_path / f"{number:03d}.png").write_bytes(BAD[name]())
    for number in range(200):
        (tmp_path / f"good{number:03d}.png").write_bytes(encoded("PNG"))
    data = ImageFolder(tmp_path, 16, max_corrupt=0.2)
    assert data.batch(range(40))["image"].shape == (40, 3, 16, 16)
    assert data.corrupt == list(range(len(BAD)))


@settings(max_examples=30)
@given(data=st.data())
def test_damaged_bytes_of_every_format_are_read_or_named(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([f for f in FORMATS if f != "AVIF" or features.check("avif")]))
    content = bytearray(encoded(form))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        assert decode_image(bytes(content), "x").mode == "RGB"
    except UnreadableImage as error:
        assert str(error).startswith("cannot read the image x: ")


def grey(content: bytes) -> list[int]:
    return np.asarray(decode_image(content, "x"))[0, :, 0].tolist()


def test_a_float_tiff_in_0_to_1_is_scaled() -> None:
    levels = np.tile(np.linspace(0, 1, 6, dtype=np.float32), (6, 1))
    assert grey(encoded("TIFF", levels)) == [0, 51, 102, 153, 204, 255]


def test_a_16_bit_tiff_is_scaled_and_white_is_zero_is_turned() -> None:
    levels = np.tile(np.array([0, 257, 25700, 65535], np.uint16), (4, 1))
    assert grey(encoded("TIFF", levels)) == [0, 1, 100, 255]
    assert grey(encoded("TIFF", levels, tiffinfo={262: 0})) == [255, 254, 155, 0]


def test_12_bits_in_16_are_read_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessellar.data.image_file._Once.dark", False)
    for _ in range(3):
        assert max(grey(encoded("PNG", np.full((4, 4), 4000, np.uint16)))) == 16
    assert caplog.text.count("no value above 4095") == 1


@pytest.mark.parametrize("form", ["TIFF", "GIF", "WEBP", "PNG"])
def test_of_several_frames_or_pages_the_first_is_taken(form: str) -> None:
    first, *others = [Image.new("RGB", (8, 8), (c, c, c)) for c in (200, 10, 30)]
    stream = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(stream, form, save_all=True, append_images=others, **options)
    assert set(grey(stream.getvalue())) == {200}


def test_other_common_formats_of_a_folder_are_read(tmp_path: Path) -> None:
    for ending in ("png", "TIF", "tiff", "bmp", "gif"):
        Image.fromarray(NOISE).save(tmp_path / f"x.{ending}")
    data = ImageFolder(tmp_path, 16)
    assert len(data) == 5 and data.batch(range(5))["image"].shape == (5, 3, 16, 16)
    assert data.corrupt == []


def test_what_is_not_read_is_named_with_its_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_left_out.cache_clear()
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.fromarray(NOISE).save(tmp_path / label / "x.png")
        for name in ("x.heic", "x.dds", "y.heic", "photo"):
            (tmp_path / label / name).write_bytes(b"")
    list_folder(tmp_path)
    list_folder(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "8 of 10 files are not read (.heic 4, no ending 2, .dds 2); .jpeg," in said[0]


def test_a_folder_of_nothing_but_other_kinds_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.heic").write_bytes(b"")
    with pytest.raises(
        UserError, match="a holds no image .*; it holds 1 other files, such as x.heic"
    ):
        list_folder(tmp_path)


def test_hidden_and_junk_files_are_no_images_at_any_depth(tmp_path: Path) -> None:
    for label in ("circle", "square"):
        (tmp_path / label / "deep").mkdir(parents=True)
        Image.fromarray(NOISE).save(tmp_path / label / "deep" / "x.png")
        junk = ("._x.png", ".hidden.png", "Thumbs.db", "desktop.ini", ".DS_Store")
        places = [f"{label}/deep/{name}" for name in junk]
        places += [f"{label}/@eaDir/x.png", f"{label}/.ipynb_checkpoints/x.png"]
        places += [f"__MACOSX/{label}/._x.png", f"{label}/__MACOSX/x.png", "$RECYCLE.BIN/x.png"]
        for place in places:
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_bytes(b"\0\5\26\7")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("circle", "square")
    assert listing.files == ("circle/deep/x.png", "square/deep/x.png")


def test_pipes_and_links_in_circles_neither_hang_nor_count_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "a" / "x.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "folder.png").mkdir()
    assert list_folder(tmp_path).files == ("a/gone.png", "a/x.png")
    with pytest.raises(UnreadableImage, match="gone.png"):
        read_image(tmp_path / "a" / "gone.png")


# ---- tars


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def pictures(count: int) -> dict[str, bytes]:
    small = encoded("PNG", np.full((4, 4), 9, np.uint8))
    assert len(small) < 512
    return {f"{number:03d}.png": small for number in range(count)}


def stream_of(path: Path) -> WebDatasetStreamData:
    return WebDatasetStreamData(
        str(path), str(path), size=4, epoch_length=8, buffer=0, batch_size=1, flip=False
    )


EMPTY_TARS = {
    "zeros": lambda path: path.write_bytes(bytes(10240)),
    "other members": lambda path: tar(path, {"README": b"x", "a.mp4": b"y"}),
    "junk": lambda path: tar(path, {"._0.png": b"x", "__MACOSX/0.png": b"y", ".DS_Store": b"z"}),
}


@pytest.mark.parametrize("name", EMPTY_TARS)
def test_a_stream_without_samples_ends_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.tar"
    EMPTY_TARS[name](path)
    for loader in (stream_of(path).train_dataloader(), stream_of(path).val_dataloader()):
        with pytest.raises(UserError, match="t.tar holds no sample"):
            next(iter(loader))


def test_an_empty_shard_among_others_is_said_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar(tmp_path / "0.tar", pictures(3))
    tar(tmp_path / "1.tar", {"README": b"x"})
    data = WebDatasetStreamData(
        [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")],
        str(tmp_path / "0.tar"),
        size=4,
        epoch_length=40,
        buffer=0,
        batch_size=1,
    )
    assert len(list(data.train_dataloader())) == 40
    assert caplog.text.count("1.tar holds no sample") == 1


@pytest.mark.parametrize("blocks", [2, 14, 23, 24])
def test_a_tar_cut_at_a_members_end_is_noticed(tmp_path: Path, blocks: int) -> None:
    """Header and content of a member are a block each; the last one cuts the end mark alone."""
    path = tar(tmp_path / "t.tar", pictures(12))
    path.write_bytes(path.read_bytes()[: blocks * 512])
    with pytest.raises(UserError, match="t.tar breaks off|t.tar cannot be read"):
        list(stream_samples(str(path)))
    with pytest.raises(UserError, match="t.tar is truncated"):
        WebDatasetData(str(path), 4).check_files()


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", pictures(12))
    content = bytearray(path.read_bytes())
    content[4 * 1024] ^= 0xFF  # the name of the fifth member no longer has its checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match="t.tar breaks off|t.tar cannot be read"):
        list(stream_samples(str(path)))
    with pytest.raises(UserError, match="t.tar is truncated"):
        WebDatasetData(str(path), 4).check_files()


def test_compressed_streams_are_read_and_their_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name, content in pictures(12).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    assert len(list(stream_samples(str(path)))) == 12
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="t.tar.gz (cannot be read|breaks off)"):
        list(stream_samples(str(path)))


@pytest.mark.parametrize(
    "name", ["._0.png", "a/._0.png", "__MACOSX/a/0.png", "a/.cache/0.png", "@eaDir/0.jpg"]
)
def test_junk_members_are_not_read(name: str) -> None:
    assert split_name(name) is None


def test_a_tar_whose_pictures_are_of_other_kinds_says_so(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", {"0.heic": b"x", "0.json": b"{}"})
    with pytest.raises(UserError, match="t.tar holds no image; .*t.tar:0 has no image"):
        WebDatasetData(str(path), 4).check_files()


def test_a_set_of_unreadable_pictures_alone_ends_in_one_line(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(BAD["avif"]())
    data = ImageFolderData(str(tmp_path), 16, val_root=str(tmp_path), max_corrupt=0.9)
    with pytest.raises(UserError, match="no image can be read|images read so far are corrupt"):
        data.train_dataset().batch([0])
