"""Records: what makes two numbers comparable, and how a comparison says so."""

import copy
from pathlib import Path

import pytest

from tessellar.errors import UserError
from tessellar.evaluation.record import (
    compare,
    differences,
    make_record,
    read_record,
    summary,
    write_record,
)


def record(samples: int = 10, seed: int = 0, value: float = 2.5) -> dict:
    return make_record(
        metrics={"FD(net)": value},
        comparable={
            "extractor": {"name": "net", "sha256": "ab"},
            "reference": "r",
            "samples": samples,
        },
        samples={"name": "s", "images": samples, "seed": seed},
        reference={"name": "data train", "hash": "r", "images": 60, "split": "train"},
        warnings=[],
        seconds=1.0,
    )


def test_seed_and_value_leave_the_fingerprint_samples_do_not() -> None:
    assert record()["fingerprint"] == record(seed=7, value=3.0)["fingerprint"]
    assert record()["fingerprint"] != record(samples=11)["fingerprint"]


def test_a_comparison_names_what_differs() -> None:
    other = record(samples=11)
    other["comparable"]["extractor"]["sha256"] = "cd"
    assert differences(record(), other) == ["extractor.sha256: ab / cd", "samples: 10 / 11"]
    text = compare(record(), other, ("mine", "theirs"))
    assert text.startswith("NOT comparable; these differ:\n  extractor.sha256: ab / cd")
    assert compare(record(), record(seed=3, value=4.0)).splitlines()[0] == "comparable"


def test_metrics_that_one_record_lacks_are_dashes() -> None:
    other = copy.deepcopy(record())
    other["metrics"] = {"PSNR": 20.0}
    rows = compare(record(), other).splitlines()
    assert rows[-2].split() == ["FD(net)", "2.5", "-"] and rows[-1].split() == ["PSNR", "-", "20"]


def test_the_line_says_n_and_reference() -> None:
    assert summary(record()) == "FD(net) 2.5  (N=10, reference=data train 60)"


def test_writing_and_reading_are_inverse(tmp_path: Path) -> None:
    write_record(record(), tmp_path / "deep" / "r.json")
    assert read_record(tmp_path / "deep" / "r.json") == record()
    assert set(record()["code"]["versions"]) >= {"torch", "tessellar", "python"}


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": {}}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match="r.json"):
        read_record(tmp_path / "r.json")
