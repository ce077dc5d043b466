"""Tables in the README are made from the packages' headers."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_of_systems_are_those_of_the_packages():
    tool = ROOT / "tools" / "systems.py"
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_paper_names_its_number():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "/` |" in line]
    (without,) = [row for row in rows if "in each file" in row]
    assert len(rows) >= 25 and "tokenizers/quantizers/" in without
