"""Tar archives that are whole: tarfile takes a header that it cannot read, and the end of the file, for the end of the archive.

An archive ends with its end marker, two blocks of zeros, and nothing but zeros follows (POSIX, pax: ustar Interchange Format).
"""

from __future__ import annotations

import tarfile
from typing import BinaryIO

from data.errors import DataError

BEGINNING = "its beginning"
_CHUNK = 1 << 20  # bytes


class CheckedHeader(tarfile.TarInfo):
    """A header for ``tarfile.open(..., tarinfo=CheckedHeader)``, which then reads an archive to its very end or raises ``TarError``."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> CheckedHeader:
        start = tar.offset
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            _require_end(tar.fileobj)
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise tarfile.ReadError("it ends there, without an end marker" if start else "it is empty, or too short") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if tar.offset <= start:
            raise tarfile.ReadError("an impossible size")
        return header


def _require_end(file: BinaryIO) -> None:
    """Read what follows the first block of zeros: another one, and nothing behind it."""
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends there, within its end marker")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError("more follows its end marker, as where archives were joined by cat; tar --concatenate joins them")
        block = file.read(_CHUNK)


def damaged(path: str, offset: int, after: str, error: Exception) -> DataError:
    """The error of an archive: ``offset`` in bytes is where the member ``after`` ends."""
    return DataError(f"{path}: a damaged tar file at byte {offset}, after {after} ({' '.join(str(error).split())}); copy or make it again")
