"""Headers of tars that others have written: what would take memory or time out of all proportion is
refused before it does.

A header of some bytes may claim a name of gigabytes, and a sparse member of a kilobyte is read as
terabytes of zeros; in a compressed tar a member itself may be that large.
"""

import tarfile
from typing import Any, NoReturn

from tessellar.errors import UserError

LONGEST_NAME = 1 << 20  # bytes of names and other entries that a header of their own holds
LARGEST_MEMBER = 1 << 28  # bytes of a file that is read at once: pictures, text, arrays


class RefusedHeader(UserError):
    """A tar whose headers claim what no set of pictures needs.

    No TarError: `tarfile.open` would take it for a sign of another compression.
    """


class Header(tarfile.TarInfo):
    """To be given to `tarfile.open` as `tarinfo`; raises RefusedHeader."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        holds_entries = self.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if holds_entries and self.size > LONGEST_NAME:
            raise RefusedHeader(f"a header claims {self.size} bytes for names")
        return super()._proc_member(tarfile_)  # type: ignore[misc]

    def _proc_sparse(self, *_: Any) -> NoReturn:
        raise RefusedHeader(f"member {self.name!r} is sparse; only whole files are read")

    # The three ways of extended headers to say the same.
    _proc_gnusparse_00 = _proc_sparse
    _proc_gnusparse_01 = _proc_sparse
    _proc_gnusparse_10 = _proc_sparse
