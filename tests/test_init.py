"""The package itself: light to import, and clear where links were checked out as text files."""

import subprocess
import sys
from pathlib import Path

import pytest

import tessellar

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, tessellar;"
        "print([m for m in ('torch', 'numpy', 'lightning', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_links_that_became_text_files_are_explained(tmp_path: Path) -> None:
    tessellar._check_links(ROOT / "tessellar")
    (tmp_path / "models").write_text("../models")
    with pytest.raises(
        ImportError, match="models should be a symbolic link but is a text file.*core.symlinks"
    ):
        tessellar._check_links(tmp_path)
