"""How much an archive from elsewhere may make us read, unpack or keep in memory before it is refused."""

from __future__ import annotations

import tarfile
from typing import Self

MAX_MEMBERS = 10_000_000  # a member takes about a kilobyte of memory while an archive is listed
MAX_HEADER_BYTES = 1 << 20  # of a long name or of PAX fields, which tarfile reads into memory whole
MAX_EXPANSION = 100  # photographs hardly shrink: a tar that unpacks to more than this many times its size is a bomb

_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BoundedTarInfo(tarfile.TarInfo):
    """For `tarfile.open(..., tarinfo=BoundedTarInfo)`: refuses headers that claim to be huge, before they are read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _HEADER_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        return header
