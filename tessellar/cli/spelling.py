"""How this process was called, and how the next command is to be called: `python train.py` or
`tessellar train`.
"""

import sys
from pathlib import Path


def spelled(command: str) -> str:
    """`python train.py` in a checkout, `tessellar train` where the installed command was called."""
    called = Path(sys.argv[0]).name
    script = called.endswith(".py") and called != "__main__.py"
    return f"python {command}.py" if script else f"tessellar {command}"
