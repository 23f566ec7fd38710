"""Reading files that a user names: regular files up to a size, so that no device and no pipe is ever waited for."""

from __future__ import annotations

import os
import stat

LARGEST_IMAGE = 256 << 20  # bytes; no encoded image is larger
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
          (stat.S_ISBLK, "a device"))


class NotARegularFile(ValueError):
    """A name leads to no regular file, or to one that is too large; the message begins with a verb."""


def kind_of(mode: int) -> str:
    """What a file of this ``st_mode`` is, "" for a regular one."""
    return next((what for test, what in _KINDS if test(mode)), "")


def read_regular(path: str, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        limit: its largest size in bytes.

    Raises:
        NotARegularFile: a folder, pipe, socket or device, a larger file, or no possible name.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, _FLAGS)  # not blocking: a pipe that nobody writes to opens at once
    except ValueError:
        raise NotARegularFile("has a name that no file can have") from None
    try:
        status = os.fstat(descriptor)
        if what := kind_of(status.st_mode):
            raise NotARegularFile(f"is {what}, not a file")
        if status.st_size <= limit:
            with open(descriptor, "rb", buffering=0 if status.st_size else -1, closefd=False) as file:
                content = file.read() if status.st_size else file.read(limit + 1)  # of a size of 0, as /proc tells, anything may come
            if len(content) <= limit:
                return content
        raise NotARegularFile(f"has more than {limit >> 20:,} MiB")
    finally:
        os.close(descriptor)
