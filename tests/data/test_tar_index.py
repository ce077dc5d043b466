import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessellar.data.tars.index import Keys, build_index, load_index
from tessellar.errors import UserError


def test_members_are_found_where_they_are(shards: Path):
    index = build_index(shards / "train-0001.tar")
    assert [index.name(i) for i in range(3)] == ["000020", "000021", "000022"] and len(index) == 10
    assert index.labels.tolist() == [i % 3 for i in range(20, 30)]
    assert index.class_names == {0: "cat", 1: "dog", 2: "owl"}
    with tarfile.open(shards / "train-0001.tar") as tar:
        for i in (0, 9):
            for field in ("png", "json"):
                expected = tar.extractfile(f"{20 + i:06}.{field}")
                assert expected is not None and index.read(i, field) == expected.read()


def test_members_of_a_sample_may_lie_apart_and_in_folders(tmp_path: Path, make_tar, make_png):
    members = {
        "a/x.PNG": make_png(1),
        "b/x.png": make_png(2),
        "a/x.cls": b"1",
        "b/x.cls": b"0",
        "README": b"hi",
    }
    index = build_index(make_tar(tmp_path / "t.tar", members))
    assert [index.name(i) for i in range(2)] == ["a/x", "b/x"] and index.labels.tolist() == [1, 0]
    assert index.read(0, "png") == members["a/x.PNG"] and index.read(1, "cls") == b"0"


def test_long_names_are_read(tmp_path: Path, make_tar, make_png):
    name = "/".join(["folder" * 10] * 5) + "/" + "n" * 90
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=format) as tar:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(make_png(7))
            tar.addfile(info, io.BytesIO(make_png(7)))
        index = build_index(tmp_path / "t.tar")
        assert index.name(0) == name and index.read(0, "png") == make_png(7)


def test_the_index_is_kept_and_renewed_when_the_tar_changes(shards: Path, make_tar, make_samples):
    path = shards / "train-0001.tar"
    first = load_index(path)
    kept = path.with_suffix(".index.npz")
    before = kept.stat().st_mtime_ns
    second = load_index(path)
    assert kept.stat().st_mtime_ns == before
    assert np.array_equal(first.offsets, second.offsets) and second.class_names == first.class_names
    make_tar(path, make_samples(0, 4))
    assert len(load_index(path)) == 4
    assert load_index(path, Keys(label="nothing")).labels.tolist() == [-1] * 4
    assert sorted(p.name for p in shards.iterdir()) == [
        "train-0000.tar",
        "train-0001.index.npz",
        "train-0001.tar",
        "val.tar",
    ]


@pytest.mark.parametrize("damage", ["bytes", "pickle", "offsets", "starts", "names"])
def test_a_kept_index_that_makes_no_sense_is_not_trusted(shards: Path, damage: str):
    path = shards / "val.tar"
    expected, kept = load_index(path), path.with_suffix(".index.npz")
    with np.load(kept) as file:
        arrays = dict(file)
    match damage:
        case "bytes":
            kept.write_bytes(kept.read_bytes()[:100])
        case "pickle":
            np.savez(kept, **{**arrays, "labels": np.array([print], dtype=object)})
        case "offsets":
            np.savez(kept, **{**arrays, "offsets": arrays["offsets"] + 10_000_000})
        case "starts":
            np.savez(kept, **{**arrays, "starts": arrays["starts"][::-1]})
        case "names":
            np.savez(kept, **{**arrays, "names": arrays["names"][:-1]})
    index = load_index(path)
    assert np.array_equal(index.offsets, expected.offsets) and len(index) == len(expected) == 6


def test_an_index_that_cannot_be_kept_stays_in_memory(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(np, "savez", refuse)
    assert len(load_index(shards / "val.tar")) == 6
    assert not list(shards.glob("*.npz"))


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.json", "a\\..\\x.png"])
def test_a_member_that_leads_out_of_the_tar_is_refused_by_name(
    tmp_path: Path, make_tar, make_png, name: str
):
    path = make_tar(tmp_path / "t.tar", {"ok.png": make_png(0), name: make_png(1)})
    with pytest.raises(UserError) as caught:
        build_index(path)
    assert repr(name) in str(caught.value) and "t.tar" in str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.features.PT"])
def test_a_pickle_is_refused_by_name(tmp_path: Path, make_tar, make_png, name: str):
    path = make_tar(tmp_path / "t.tar", {"x.png": make_png(0), name: b"\x80\x04."})
    with pytest.raises(UserError, match=f"{name}' is a pickle"):
        build_index(path)


def test_a_link_is_refused_by_name(tmp_path: Path, make_png):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            info = tarfile.TarInfo("x.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(UserError, match="'x.png' is a link"):
            build_index(tmp_path / "t.tar")


def test_the_same_member_twice_is_refused(tmp_path: Path, make_png):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("x.png")
            info.size = len(make_png(0))
            tar.addfile(info, io.BytesIO(make_png(0)))
    with pytest.raises(UserError, match="x.png twice"):
        build_index(tmp_path / "t.tar")


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, -10240, -11000])
def test_a_truncated_tar_is_refused_wherever_it_was_cut(shards: Path, keep: int):
    path = shards / "train-0001.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) if keep < 0 else 0
    path.write_bytes(content[: end + keep + 10240] if keep < 0 else content[:keep])
    with pytest.raises(UserError, match="train-0001.tar is truncated"):
        build_index(path)


def test_a_damaged_header_is_not_taken_for_the_end(shards: Path):
    path = shards / "train-0001.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"000024.json")
    content[place + 148 : place + 156] = b"12345670"  # the checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte"):
        build_index(path)


def test_a_compressed_tar_is_refused(tmp_path: Path, make_png):
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(make_png(0))
        tar.addfile(info, io.BytesIO(make_png(0)))
    with pytest.raises(UserError, match="not an uncompressed tar"):
        build_index(tmp_path / "t.tar")


@pytest.mark.parametrize(
    "members, why",
    [
        ({"x.json": b"{"}, "x.json is not JSON"),
        ({"x.json": b'{"caption": "\xff"}'}, "x.json is not UTF-8"),
        ({"x.txt": b"caf\xe9"}, "x.txt is not UTF-8"),
        ({"x.json": b'{"caption": 5}'}, "caption is 5"),
        ({"x.json": b'{"caption": "\\ud800"}'}, "cannot be written as UTF-8"),
        ({"x.json": b'{"class": -1}'}, "class is -1"),
        ({"x.json": b'{"class": 1e3}'}, "class is 1000.0"),
        ({"x.json": b'{"class": 99999999999999999999999}'}, "class is 9999"),
        ({"x.json": b'{"class": true}'}, "class is True"),
        ({"x.cls": b"seven"}, "x.cls is not cls"),
        ({"x.json": b"[" * 100_000}, "x.json is nested more than 64 deep"),
    ],
)
def test_a_sample_whose_text_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, make_tar, make_png, members, why
):
    index = build_index(
        make_tar(tmp_path / "t.tar", {"x.png": make_png(0), **members, "y.png": make_png(1)})
    )
    assert len(index) == 1 and index.name(0) == "y"
    assert len(index.left_out) == 1 and why in index.left_out[0]


def test_a_sample_without_an_image_is_left_out(tmp_path: Path, make_tar, make_png):
    index = build_index(make_tar(tmp_path / "t.tar", {"x.txt": b"lost", "y.jpg": make_png(0)}))
    assert len(index) == 1 and index.left_out == (f"{tmp_path / 't.tar'}:x has no image",)


def test_two_names_of_one_class_are_refused(tmp_path: Path, make_tar, make_png):
    members = {"x.png": make_png(0), "x.json": b'{"class": 0, "class_name": "cat"}'}
    members |= {"y.png": make_png(0), "y.json": b'{"class": 0, "class_name": "dog"}'}
    with pytest.raises(UserError, match="class 0 is 'dog' here and 'cat' before"):
        build_index(make_tar(tmp_path / "t.tar", members))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 12_000), content=st.binary(min_size=1, max_size=40))
def test_any_damage_ends_in_an_index_or_a_user_error(shards: Path, place: int, content: bytes):
    original = (shards / "val.tar").read_bytes()
    path = shards / "damaged.tar"
    path.write_bytes(original[:place] + content + original[place + len(content) :])
    try:
        index = build_index(path)
    except UserError:
        return
    assert len(index) + len(index.left_out) <= 6 + 1
    assert all(len(index.read(i, index.image_field(i))) >= 0 for i in range(len(index)))
