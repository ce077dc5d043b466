"""What attacks on files have in common: limits while they are read, and what was reached meanwhile."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tessellar.errors import UserError

SPOTS: list[str] = []  # what was opened, unpickled or connected to while `watched`
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        SPOTS.append(f"{event} {arguments[0]}")
    elif _watching and event in ("os.system", "pickle.find_class"):
        SPOTS.append(f"{event} {arguments}")


sys.addaudithook(_hook)  # cannot be taken back; it looks only while `watched`


@contextmanager
def watched(gigabytes: float = 3) -> Iterator[None]:
    """Notes what is reached, and gives no more memory than `gigabytes` on top of what is in use."""
    global _watching
    SPOTS.clear()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + int(gigabytes * 2**30), before[1]))
    _watching = True
    try:
        yield
    finally:
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(call: Callable[[], Any], line: str, evil: Path | None = None) -> None:
    """`call` ends in a UserError of one line that fits `line`; nothing outside of it is reached."""
    with watched(), pytest.raises(UserError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value).strip() and len(str(caught.value)) < 1000
    reached = [spot for spot in SPOTS if not spot.startswith("open ") or str(evil) in spot]
    assert reached == []
