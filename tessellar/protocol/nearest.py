"""The hint behind every unknown name: the valid one that it resembles, or all of them where they
are few.
"""

import difflib
from collections.abc import Iterable


def nearest(wrong: str, names: Iterable[str], listed: int = 12) -> str:
    """`; did you mean 'x'?` where a name resembles `wrong`, else the names if there are at most
    `listed`, else "".
    """
    names = sorted(names)
    close = difflib.get_close_matches(wrong, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= listed else ""
