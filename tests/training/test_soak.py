"""The short version of `make soak`: SIGKILLs at random steps, then the same weights bit for bit."""

from pathlib import Path

from benchmarks.soak import soak


def test_a_run_killed_again_and_again_ends_with_the_weights_of_a_quiet_one(tmp_path: Path) -> None:
    report = soak(tmp_path, kills=2, updates=18)
    assert report.different == [] and report.compared > 100
    assert report.kills == 2 and report.killed_at == sorted(report.killed_at)
