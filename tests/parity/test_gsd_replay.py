"""Recorded passes of the official SJD and GSD code are reproduced: clusters, ratios, commits, next drafts."""

from pathlib import Path

import pytest

from tessellar.parity.verify import verify

RECORDED = Path(__file__).parents[1] / "golden" / "gsd"


def test_every_recorded_output_is_reproduced() -> None:
    report = verify(RECORDED)
    assert report.passed, report.as_dict()
    assert {c.case for c in report.comparisons} == {"gsd", "sjd", "init"}


@pytest.mark.parametrize("case", ["sjd", "gsd", "init"])
def test_a_case_alone(case: str) -> None:
    report = verify(RECORDED, [case])
    assert report.passed and {c.case for c in report.comparisons} == {case}
