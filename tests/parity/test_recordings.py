"""Every recording of an official system in tests/golden is reproduced: all outputs, with nothing left over."""

from pathlib import Path

import pytest

from tessellar.parity.own import SYSTEM
from tessellar.parity.registration import systems
from tessellar.parity.verify import verify

FOLDERS = sorted((Path(__file__).parents[1] / "golden").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_recorded_output_is_reproduced(folder: Path) -> None:
    report = verify(folder)
    assert report.comparisons and report.leftovers == []
    assert [c.name for c in report.comparisons if not c.passed] == []


def test_every_replay_has_its_recording() -> None:
    assert {folder.name for folder in FOLDERS} == set(systems()) - {
        SYSTEM
    }  # that one is of users' own modules
