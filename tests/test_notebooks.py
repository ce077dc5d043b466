"""The notebooks are made of their sources, without outputs, and `make check` executes them at a tiny size."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
TOOL = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
SOURCES = sorted((FOLDER / "sources").glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_made_of_its_source(source: Path) -> None:
    text = (FOLDER / f"{source.stem}.ipynb").read_text()
    assert text == TOOL["text_of"](source), "python tools/notebooks.py --write"
    made = json.loads(text)
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] for cell in code)
    for cell in code:
        compile(cell["source"], source.stem, "exec")
    shrunk = TOOL["tiny"](TOOL["notebook"](source), TOOL["TINY"][source.stem])
    assert shrunk["cells"] != made["cells"]


def test_there_is_no_notebook_without_a_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}
    assert set(TOOL["TINY"]) == {path.stem for path in SOURCES}


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path) -> None:
    pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `notebooks` is not installed")
    TOOL["run"](source)
