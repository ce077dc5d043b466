"""The short version of `make soak`: attacks at random steps, then the same weights bit for bit and the same rows."""

from pathlib import Path

from benchmarks.soak import soak


def test_a_run_attacked_again_and_again_ends_as_a_quiet_one(tmp_path: Path) -> None:
    report = soak(tmp_path, attacks=4, updates=18)
    assert report.different == [] and report.broken == []
    assert report.tensors > 100 and report.rows == 19  # the first is of half an update
    assert [attack.partition(" at ")[0] for attack in report.attacks] == [
        "KILL",
        "full disk",
        "KILL of the group",
        "TERM",
    ]
