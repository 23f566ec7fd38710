"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from filelock import FileLock, Timeout

from config import ConfigError

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def _temporary_beside(path: str) -> Iterator[str]:
    folder, name = os.path.split(os.path.abspath(path))
    scratch = os.path.join(folder, f"{TEMPORARY}{name}-{os.getpid()}")
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


@contextlib.contextmanager
def open_atomically(path: str) -> Iterator[BinaryIO]:
    """A temporary file in the same folder; it gets its name, synced to the disk, once the block is done without an error."""
    with _temporary_beside(path) as scratch:
        try:
            with open(scratch, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.filename is None:  # a full disk does not say which file it was
                error.filename = path
            raise
        os.replace(scratch, path)
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def write_atomically(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then give it its name; synced to the disk."""
    with open_atomically(path) as file:
        write(file)


def replace_file(path: str, content: bytes) -> None:
    """``write_atomically`` of a few bytes."""
    write_atomically(path, lambda file: file.write(content))


def require_place(path: str, lead: str = "") -> None:
    """Make sure, before long work, that a file can be written at ``path``.

    Args:
        lead: what the message begins with, such as the key's name.

    Raises:
        ConfigError: there is no such folder, no permission, or a folder of that name.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ConfigError(f"{lead}{path}; no file can be written there: it is a folder; give the name of a file")
    if not os.path.isdir(folder):
        raise ConfigError(f"{lead}{path}; no file can be written there: there is no folder {folder}; make it first")
    probe = os.path.join(folder, f"{TEMPORARY}probe-{os.getpid()}")
    try:
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise ConfigError(f"{lead}{path}; no file can be written there ({error.strerror}); choose another place") from None


def link_atomically(target: str, link: str) -> None:
    """Make ``link`` lead to ``target``, a file of the same folder, replacing what it led to in one move."""
    with _temporary_beside(link) as scratch:
        try:
            os.symlink(os.path.basename(target), scratch)
        except (OSError, NotImplementedError):
            os.link(target, scratch)  # file systems without symbolic links
        os.replace(scratch, link)
    _sync_folder(os.path.dirname(os.path.abspath(link)))


def lock_folder(folder: str) -> FileLock:
    """Lock ``folder`` until ``release`` of what is returned, or until this process dies; DataLoader workers do not hold it.

    Raises:
        BlockingIOError: another process holds it; ``filename`` says which.
    """
    lock, holder = FileLock(os.path.join(folder, ".lock")), os.path.join(folder, ".lock-holder")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = ""
        with contextlib.suppress(OSError), open(holder, encoding="utf-8") as file:
            who = file.read(200).strip()
        raise BlockingIOError(errno.EAGAIN, "locked", who) from None
    with contextlib.suppress(OSError), open(holder, "w", encoding="utf-8") as file:  # a full disk: the lock itself holds
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    return lock


def free_bytes(folder: str) -> int:
    """Bytes free on the disk of ``folder``, or of the nearest folder above that exists."""
    there = os.path.abspath(folder)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    return shutil.disk_usage(there).free


def file_limit() -> int:
    """The largest file this process may write (ulimit -f)."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def remove_leftovers(folder: str) -> list[str]:
    """Delete temporary files that a killed process left in ``folder``; their names."""
    leftovers = [name for name in os.listdir(folder) if name.startswith(TEMPORARY)]
    for name in leftovers:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, name))
    return leftovers


def _sync_folder(folder: str) -> None:
    # The rename itself must reach the disk; some file systems (and Windows) refuse, and need not.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
