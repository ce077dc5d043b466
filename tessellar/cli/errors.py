"""How every command ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable

from tessellar.errors import UserError


def run(command: Callable[[], int | None]) -> int:
    """Call `command` and return the process's exit code."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
