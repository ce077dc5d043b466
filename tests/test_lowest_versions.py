"""The tool that installs the lowest versions reads every bound that pyproject.toml declares."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("lowest", ROOT / "tools" / "lowest_versions.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_every_dependency_has_a_lower_bound() -> None:
    pins = tool.lowest(tool.declared(["data", "text", "dev"]))
    names = {pin.split("==")[0].split("[")[0] for pin in pins}
    assert {"torch", "timm", "pillow", "datasets", "transformers", "pytest"} <= names
    assert not names & set(tool.UNUSED)
    assert all(pin.count("==") == 1 for pin in pins)


def test_versions_with_known_holes_are_below_the_bounds() -> None:
    """timm before 1.0.27 unpickles what `checkpoint_path` names; torch before 2.6 runs code with weights_only."""
    pins = dict(pin.split("==") for pin in tool.lowest(tool.declared([])))
    assert tuple(map(int, pins["timm"].split("."))) >= (1, 0, 27)
    assert tuple(map(int, pins["torch"].split("."))) >= (2, 6)


def test_a_requirement_without_a_bound_is_named() -> None:
    with pytest.raises(SystemExit, match="'torch' has no lower bound"):
        tool.lowest(["torch"])
