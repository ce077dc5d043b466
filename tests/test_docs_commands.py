"""The script that follows the pages knows every page with commands, and leaves out only what there is."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import re
import sys
from pathlib import Path

sys.path.insert(0, "tools")
import docs_commands as script

pages = script.pages()
lines = [line for page in pages for line in script.commands_of(page)]
known = {page.path for page in pages}
written = [script.ROOT / "README.md", *(script.ROOT / "docs").rglob("*.md")]
print([path.name for path in written if "```bash" in path.read_text() and path not in known])
print([left for left in script.LEFT_OUT if not any(re.search(left, line) for line in lines)])
run = [line for line in lines if not any(re.search(left, line) for left in script.LEFT_OUT)]
print([line for line in run if line.split()[0] not in ("python", "tessellar")], len(run) > 30)
"""


def test_every_command_of_the_pages_is_run_or_named() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]", "[] True"], done.stdout + done.stderr
