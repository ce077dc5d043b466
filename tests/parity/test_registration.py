"""Replays are found by their packages: ours without any list, others' by the name of their package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tessellar.errors import UserError
from tessellar.parity.registration import PAPERS, Replay
from tessellar.parity.verify import UnknownSystem, verify

META = """{
    "system": "doubled",
    "config": {},
    "cases": {"twice": {"settings": {"factor": 2}}},
    "tensors": {
        "x": {"role": "input", "case": "twice", "shape": [3], "dtype": "float32"},
        "y": {"role": "output", "case": "twice", "shape": [3], "dtype": "float32"},
        "z": {"role": "output", "case": "twice", "shape": [3], "dtype": "float32", "settings": {"factor": 4}}
    }
}"""

REPLAY = """
from tessellar.parity.registration import replays


@replays("doubled", "tw*")
def multiply(recording):
    x = recording.inputs["x"]
    return {name: x * recording.settings(name)["factor"] for name in recording.outputs("?")}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = torch.arange(3.0)
    save_file({"x": x, "y": 2 * x, "z": 4 * x}, tmp_path / "io.safetensors")
    (tmp_path / "meta.json").write_text(META)
    return tmp_path


@pytest.mark.parametrize("place", ["parity.py", "doubling/parity.py"])
def test_a_stranger_s_package_brings_its_replays(
    folder: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"stranger_{len(place)}"
    (tmp_path / package / place).parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / place).write_text(REPLAY.replace("doubled", package))
    (folder / "meta.json").write_text(META.replace("doubled", package))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownSystem, match="is not known; there are .*llamagen"):
        verify(folder)
    report = verify(folder, packages=[package])
    assert report.passed and [c.name for c in report.comparisons] == ["y", "z"]
    with pytest.raises(UnknownSystem, match="is not known"):
        verify(folder)  # the package was named for one question only


def test_a_package_that_does_not_exist_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="'nowhere' is no package that can be imported here"):
        verify(folder, packages=["nowhere"])


def test_patterns_of_cases() -> None:
    replay = Replay(lambda recording: {}, ("gen_shared", "gen_sample_*"))
    assert replay.covers_any({"tok_main", "gen_sample_cfg"})
    assert not replay.covers_any({"tok_main", "gen_train"})


def test_tokenizers_and_sampling_never_need_a_generator_s_package() -> None:
    root = Path(__file__).parents[2]
    files = [*(root / "tokenizers").rglob("*.py"), *(root / "tessellar" / "sampling").rglob("*.py")]
    assert len(files) > 50
    assert [path for path in files if f"{PAPERS[0]}." in path.read_text(encoding="utf-8")] == []
