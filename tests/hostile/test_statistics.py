"""Statistics, npz files and records that are none: named in one line, before memory is taken for what headers claim."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessellar.errors import UserError
from tessellar.evaluation.record import read_record
from tessellar.evaluation.references import load_statistics, save_statistics
from tessellar.evaluation.sources import ArrayImages, FolderImages
from tessellar.measures.frechet import frechet_distance
from tessellar.npz import open_rows, read_arrays
from tests.hostile.attacks import refused

EYE = np.eye(4)
ZERO = np.zeros(4)


def meta(**entries: Any) -> np.ndarray:
    return np.array(json.dumps(entries))


def shifted(value: float) -> np.ndarray:
    """A symmetric matrix of positive diagonal with the eigenvalue 1 - value."""
    matrix = np.eye(4)
    matrix[0, 1] = matrix[1, 0] = value
    return matrix


STATISTICS: dict[str, tuple[dict[str, Any], str]] = {
    "a complex mean": ({"mu": ZERO + 1j}, "mu holds complex numbers"),
    "a complex covariance": ({"sigma": EYE * (1 + 0j)}, "sigma holds complex numbers"),
    "a negative covariance": ({"sigma": -EYE}, "sigma has a negative variance"),
    "a negative eigenvalue": ({"sigma": shifted(2.0)}, "sigma has negative eigenvalues"),
    "an asymmetric covariance": ({"sigma": np.triu(EYE + 1)}, "sigma is not symmetric"),
    "a covariance of another size": ({"sigma": np.eye(5)}, r"mean \(4,\) and covariance \(5, 5\)"),
    "a covariance that is a row": ({"sigma": ZERO}, r"covariance \(4,\); needed are"),
    "a mean without dimensions": ({"mu": np.float64(1)}, r"mean \(\) and covariance"),
    "a mean of two dimensions": ({"mu": EYE}, r"mean \(4, 4\) and covariance"),
    "no features": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mean \(0,\)"),
    "a mean of text": ({"mu": np.array(["a"] * 4)}, "mu holds <U1; statistics are real"),
    "a mean of truths": ({"mu": ZERO > 1}, "mu holds bool; statistics are real"),
    "nan": ({"mu": ZERO * np.nan}, "values that are not finite"),
    "inf": ({"sigma": EYE * np.inf}, "values that are not finite"),
    "values without end": ({"mu": ZERO + 1e200}, "too large to be those of features"),
    "a count of -5": ({"meta": meta(count=-5)}, "count is -5; it must be an integer in"),
    "a count of 0": ({"meta": meta(count=0)}, "count is 0"),
    "a count of 1": ({"meta": meta(count=1)}, "count is 1"),
    "half a count": ({"meta": meta(count=2.5)}, "count is 2.5"),
    "a count that is a text": ({"meta": meta(count="x")}, "count is 'x'"),
    "a count that is true": ({"meta": meta(count=True)}, "count is True"),
    "meta that is half": ({"meta": np.array("{")}, "meta is not JSON"),
    "meta that is a list": ({"meta": np.array("[1]")}, "meta is a list, not a mapping"),
    "meta that is deep": ({"meta": np.array("[" * 5000)}, "meta is nested more than 64 deep"),
    "meta that is a number": ({"meta": np.array(7)}, "meta is not a JSON text"),
    "meta of several": ({"meta": np.array(["{}", "{}"])}, "meta is not a JSON text"),
    "a name that is a number": ({"meta": meta(name=7)}, "name is 7; it must be a text"),
    "a split that is a list": ({"meta": meta(split=[1])}, r"split is \[1\]"),
    "an extractor that is a text": ({"meta": meta(extractor="x")}, "extractor is 'x'"),
    "warnings that are a number": ({"meta": meta(warnings=7)}, "warnings is 7"),
    "class names that are numbers": ({"meta": meta(class_names=[1])}, r"class_names is \[1\]"),
    "features of another width": (
        {"meta": meta(), "features": np.zeros((3, 5))},
        r"features have shape \(3, 5\); needed are rows of 4",
    ),
    "features that are nan": (
        {"meta": meta(), "features": np.full((3, 4), np.nan)},
        "features hold values that are not finite",
    ),
    "features of text": (
        {"meta": meta(), "features": np.array([["a"] * 4])},
        "features holds <U1",
    ),
    "negative spatial statistics": (
        {"mu_s": ZERO, "sigma_s": -EYE},
        "sigma has a negative variance",
    ),
    "objects": ({"mu": np.array([None] * 4)}, "is truncated or not readable"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_are_none_are_refused_by_name(tmp_path: Path, name: str) -> None:
    arrays, line = STATISTICS[name]
    np.savez(tmp_path / "r.npz", **{"mu": ZERO, "sigma": EYE, **arrays})
    refused(
        lambda: load_statistics(tmp_path / "r.npz"),
        f"r.npz.*{line}|^the statistics hold.*finite|^statistics have.*{line}",
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_covariances_of_few_images_are_taken_whatever_their_precision(
    tmp_path: Path, dtype: type
) -> None:
    """Of fewer images than features the smallest eigenvalues are zeros, up to rounding on either side."""
    features = np.random.default_rng(0).normal(size=(9, 64)) @ np.diag(np.logspace(0, -3, 64))
    sigma = np.cov(features, rowvar=False).astype(dtype)
    np.savez(tmp_path / "r.npz", mu=features.mean(0).astype(dtype), sigma=sigma)
    moments = load_statistics(tmp_path / "r.npz").moments
    assert moments.dim == 64
    if dtype is np.float16:
        return
    assert frechet_distance(moments, moments) < 0.1
    save_statistics(load_statistics(tmp_path / "r.npz"), tmp_path / "again.npz")
    again = load_statistics(tmp_path / "again.npz")
    assert torch.equal(again.moments.cov, moments.cov)


def test_whole_numbers_are_statistics_and_a_constant_set_has_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", mu=np.arange(4), sigma=np.eye(4, dtype=np.int64))
    assert load_statistics(tmp_path / "r.npz").moments.mean.tolist() == [0, 1, 2, 3]
    np.savez(tmp_path / "r.npz", mu=np.arange(4), sigma=np.zeros((4, 4)))
    assert float(load_statistics(tmp_path / "r.npz").moments.cov.sum()) == 0


# ---- headers of npz files


def npy(shape: str, dtype: str = "<f8", values: bytes = b"", fortran: bool = False) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
    header = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


HEADERS: dict[str, bytes] = {
    "10^13 values": npy("(10000000000000,)"),
    "10^13 values and a few": npy("(10000000000000,)", values=bytes(64)),
    "more values than there are": npy("(9,)", values=bytes(8)),
    "fewer values than there are": npy("(1,)", values=bytes(64)),
    "a shape that overflows": npy("(4294967296, 4294967296, 4294967296)", values=bytes(8)),
    "a negative side": npy("(-4,)", values=bytes(32)),
    "a shape of texts": npy("('a',)", values=bytes(32)),
    "a shape of a thousand sides": npy(f"({'1,' * 80})", values=bytes(8)),
    "objects": npy("(4,)", dtype="|O", values=bytes(32)),
    "an unknown type": npy("(4,)", dtype="<q9", values=bytes(32)),
    "a type of 2 GB": npy("(4,)", dtype="|S2147483647", values=bytes(32)),
    "brackets": b"\x93NUMPY\x02\x00" + struct.pack("<I", 9000) + b"(" * 9000,
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{}",
    "a newer version": b"\x93NUMPY\x09\x00" + struct.pack("<H", 2) + b"{}",
    "code": npy("__import__('os').getpid()", values=bytes(32)),
    "text": b"hello",
    "nothing": b"",
}


def archive(path: Path, **parts: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("array", ["mu", "arr_0", "arr_1"])
def test_a_hostile_npz_header_is_one_line(tmp_path: Path, array: str, name: str) -> None:
    good = {"mu": _npy(ZERO), "sigma": _npy(EYE)}
    images = {"arr_0": _npy(np.zeros((2, 4, 4, 3), np.uint8)), "arr_1": _npy(np.zeros(2, np.int64))}
    parts = {**good, **images, array: HEADERS[name]}
    path = archive(tmp_path / "r.npz", **parts)
    reader = load_statistics if array == "mu" else ArrayImages
    refused(lambda: reader(path), "r.npz is truncated or not readable")


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def method_99(content: bytes) -> bytes:
    """A compression that nobody knows, in the header of the first part and in the directory."""
    content = content.replace(
        b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x04\x14\x00\x00\x00\x63\x00", 1
    )
    directory = content.index(b"PK\x01\x02")
    return content[: directory + 10] + b"\x63\x00" + content[directory + 12 :]


def encrypted(content: bytes) -> bytes:
    directory = content.index(b"PK\x01\x02")
    return content[:6] + b"\x01" + content[7 : directory + 8] + b"\x01" + content[directory + 9 :]


def flipped(content: bytes) -> bytes:
    place = content.index(b"PK\x03\x04") + 170  # in the values, behind two headers
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "method 99": method_99,
    "encrypted": encrypted,
    "a flipped bit": flipped,
    "cut": lambda content: content[: len(content) // 2],
    "a byte": lambda content: content[:1],
    "nothing": lambda content: b"",
    "text": lambda content: b"hello",
    "without its first half": lambda content: content[len(content) // 2 :],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_one_line(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "r.npz", mu=_npy(ZERO), sigma=_npy(EYE))
    path.write_bytes(ARCHIVES[name](path.read_bytes()))
    refused(lambda: load_statistics(path), "r.npz is (not an npz file|truncated or not readable)")


def test_a_compressed_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("mu.npy", "w", force_zip64=True) as part:
            part.write(npy("(640000000,)"))
            for _ in range(8):
                part.write(bytes(1 << 20))
    refused(lambda: load_statistics(tmp_path / "r.npz"), "r.npz is truncated or not readable")


@settings(max_examples=60)
@given(data=st.data())
def test_an_npz_of_any_damage_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = archive(tmp_path_factory.mktemp("npz") / "r.npz", mu=_npy(ZERO), sigma=_npy(EYE))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        load_statistics(path)
    except UserError as error:
        assert "\n" not in str(error)


# ---- images, their labels and their records

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
SETS: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"arr_0": IMAGES / 255}, "arr_0 of .* is float64"),
    "of one channel": ({"arr_0": IMAGES[..., :1]}, "needed is uint8"),
    "without a batch": ({"arr_0": IMAGES[0]}, "needed is uint8"),
    "none": ({"arr_0": IMAGES[:0]}, "it holds no images"),
    "of no height": ({"arr_0": IMAGES[:, :0]}, "it holds no images"),
    "labels of text": ({"arr_1": np.array(["a", "b", "c"])}, "no whole numbers of at least 0"),
    "labels of fractions": ({"arr_1": np.zeros(3)}, "no whole numbers of at least 0"),
    "negative labels": ({"arr_1": np.array([0, -1, 2])}, "no whole numbers of at least 0"),
    "labels without end": ({"arr_1": np.array([0, 1, 2**40])}, "no whole numbers of at least 0"),
    "fewer labels": ({"arr_1": np.array([0])}, "holds 3 images but 1 labels"),
    "another name": ({"images": IMAGES}, "holds no array 'arr_0'"),
}


@pytest.mark.parametrize("name", SETS)
def test_images_that_are_none_are_refused_by_name(tmp_path: Path, name: str) -> None:
    arrays, line = SETS[name]
    start = {} if name == "another name" else {"arr_0": IMAGES}
    np.savez(tmp_path / "s.npz", **{**start, **arrays})
    refused(lambda: ArrayImages(tmp_path / "s.npz"), line)


RECORDS: dict[str, tuple[str, str]] = {
    "nothing": ("", "samples.json is not JSON"),
    "null": ("null", "holds no record of sample.py"),
    "a list": ("[1]", "holds no record of sample.py"),
    "deep": ("[" * 50_000, "nested more than 64 deep"),
    "names that are a number": ('{"class_names": 7}', "class_names is no list"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_samples_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "samples.json").write_text(RECORDS[name][0])
    np.savez(tmp_path / "samples.npz", IMAGES, np.arange(3))
    refused(lambda: ArrayImages(tmp_path / "samples.npz"), RECORDS[name][1])
    refused(lambda: FolderImages(tmp_path), f"{RECORDS[name][1]}|no images|holds no image")


@pytest.mark.parametrize(
    "sampling", ['{"algorithm": 7}', '{"guidance": []}', '{"guidance_scale": {}}', "7", "[]"]
)
def test_settings_of_no_version_in_a_record_are_passed_over(tmp_path: Path, sampling: str) -> None:
    (tmp_path / "samples.json").write_text(f'{{"sampling": {sampling}}}')
    np.savez(tmp_path / "samples.npz", IMAGES)
    assert ArrayImages(tmp_path / "samples.npz").describe()["images"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"metrics": 7, "comparable": {}, "fingerprint": "x"}',
        '{"metrics": {"fd": "x"}, "comparable": {}, "fingerprint": "x"}',
        '{"metrics": {}, "comparable": [], "fingerprint": "x"}',
        "[" * 5000,
    ],
)
def test_a_record_of_an_evaluation_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    refused(lambda: read_record(tmp_path / "a.json"), "a.json")


def test_rows_of_an_array_that_ends_early_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", IMAGES)
    with open_rows(tmp_path / "s.npz", "arr_0") as rows:
        assert rows.read(2).shape == (2, 4, 4, 3)
        with pytest.raises(UserError, match="s.npz is truncated or not readable"):
            rows.read(2)
    assert read_arrays(tmp_path / "s.npz", {"x": ("arr_0",)})["x"].shape == IMAGES.shape
