"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TextIO

from filelock import FileLock, Timeout

from config import ConfigError, read_text_file

TEMPORARY = ".tmp-"


# Names of what this process, or another one, has open already.
_OPEN = re.compile(r"/dev/(std(in|out|err)|fd/\d+)|/proc/(self|thread-self|\d+)/fd/\d+")


@contextlib.contextmanager
def _temporary_beside(path: str) -> Iterator[str]:
    folder, name = os.path.split(os.path.abspath(path))
    scratch = os.path.join(folder, f"{TEMPORARY}{name[-60:]}-{os.getpid()}")  # a longer name could have more bytes than a name may have
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


def is_stream(path: str) -> bool:
    """Whether ``path`` is a device or a pipe, or is open already: it is written to, and nothing takes its place."""
    if _OPEN.fullmatch(os.path.abspath(path)):
        return True
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
    return False


@contextlib.contextmanager
def open_atomically(path: str) -> Iterator[BinaryIO]:
    """A temporary file that gets the name ``path``, synced to the disk, once the block is done without an error.

    Of a symbolic link it is the file that it leads to; a device or a pipe (``is_stream``) gets the temporary file's content instead.
    """
    if is_stream(path):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.seek(0)
            with _named(path), open(path, "ab", buffering=0) as stream:
                shutil.copyfileobj(file, stream)
        return
    place = os.path.realpath(path)
    with _temporary_beside(place) as scratch:
        with _named(path), open(scratch, "wb") as file:
            with contextlib.suppress(OSError):
                shutil.copymode(place, scratch)  # what only its owner may read stays so
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, place)
    _sync_folder(os.path.dirname(place))


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None:  # a full disk does not say which file it was
            error.filename = path
        raise


def write_atomically(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then give it its name; synced to the disk."""
    with open_atomically(path) as file:
        write(file)


def replace_file(path: str, content: bytes) -> None:
    """``write_atomically`` of a few bytes."""
    write_atomically(path, lambda file: file.write(content))


def require_place(path: str, lead: str = "") -> None:
    """Make sure, before long work, that a file can be written at ``path``: a new one, in place of a regular one, or to a device.

    Args:
        lead: what the message begins with, such as the key's name.

    Raises:
        ConfigError: there is no such folder, no permission, or something else of that name.
    """
    if fault := _fault_of_place(path):
        raise ConfigError(f"{lead}{path}; no file can be written there{fault}")


def _fault_of_place(path: str) -> str:
    """Why no file can be written at ``path``, with the remedy; "" where one can."""
    elsewhere = "; choose another place"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or error}){elsewhere}"
    if stat.S_ISDIR(mode):
        return ": it is a folder; give the name of a file"
    if is_stream(path):
        return "" if os.access(path, os.W_OK) else f" (Permission denied){elsewhere}"
    if not stat.S_ISREG(mode):
        return f": it is neither a file nor a device that takes one{elsewhere}"
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        return f": there is no folder {folder}; make it first"
    probe = os.path.join(folder, f"{TEMPORARY}probe-{os.getpid()}")
    try:
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        return f" ({error.strerror}){elsewhere}"
    return ""


LARGEST_RECORD = 1 << 30  # bytes of a file that a run writes of itself
_LARGEST_NUMBER = 1e30


def read_record(path: str) -> str:
    """The text of a file that a run wrote of itself; "" where there is none.

    Raises:
        OSError: unreadable, no regular file, or larger than any.
    """
    return read_text_file(path, LARGEST_RECORD, "replace") if os.path.lexists(path) else ""


def read_json(text: str) -> Any:
    """The value of a JSON text; a number that is not finite, or that no figure of ours can be, is None.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    def real(digits: str) -> float | None:
        number = float(digits)
        return number if abs(number) <= _LARGEST_NUMBER else None

    try:
        return json.loads(text, parse_float=real, parse_int=lambda digits: int(digits) if len(digits) <= 18 else None,
                          parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


STANDARD = "-"  # standard input among the files read, standard output among those written


def require_outputs(outputs: Iterable[tuple[str, str]], inputs: Iterable[str]) -> None:
    """Decide, before long work, whether a command may write its files: each has a place, and none is a file that the command reads, or
    that standard output goes to, or another one of them.

    Args:
        outputs: (what names it, such as a key; path), ``STANDARD`` being standard output.
        inputs: paths of what the command reads, looked at only where an output would replace something.

    Raises:
        ConfigError: an output may not be written; the message names it.
    """
    places: dict[Any, tuple[str, str]] = {}
    for name, path in outputs:
        if path != STANDARD:
            require_place(path, f"{name} is ")
        own = _identity(path, standard=1)
        if own in places:
            raise ConfigError(f"{name} is {path}; another output goes there already ({places[own][0]})")
        places[own] = name, path
    replaced = {own: named for own, named in places.items() if isinstance(own, tuple) and os.path.isfile(named[1])}
    if not replaced:
        return
    for descriptor, stream in ((1, "standard output"), (2, "standard error")):
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            named = replaced.get((found.st_dev, found.st_ino))
            if named and not is_stream(named[1]):
                raise ConfigError(f"{named[0]} is {named[1]}; {stream} goes there already")
    for source in inputs:
        if named := replaced.get(_identity(source, standard=0)):
            raise ConfigError(f"{named[0]} is {named[1]}; this command reads it ({source}), and would overwrite it; give another file")


def _identity(path: str, standard: int) -> tuple[int, int] | str:
    """What two paths of one file share."""
    try:
        found = os.fstat(standard) if path == STANDARD else os.stat(path)
        return found.st_dev, found.st_ino
    except (OSError, ValueError):
        return os.path.realpath(path) if "\0" not in path else path


def move_file(scratch: str, path: str) -> None:
    """Give the file ``scratch`` the name ``path``, or that of the file that ``path`` links to."""
    place = os.path.realpath(path)
    if os.stat(scratch).st_dev == os.stat(os.path.dirname(place)).st_dev:
        os.replace(scratch, place)
    else:
        with open(scratch, "rb") as file:
            write_atomically(place, lambda target: shutil.copyfileobj(file, target))


class _Rows:
    """What ``csv`` writes rows to that end in CR LF; they reach ``file`` with LF alone."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: TextIO) -> Any:
    """A ``csv.writer`` of lines that end in LF; a name with a CR is quoted, as one with an LF is: readers take either for a line's end."""
    return csv.writer(_Rows(file), lineterminator="\r\n")


def append_whole(path: str, content: bytes, sync: bool = False) -> None:
    """Add ``content`` at the end of a file: all of it, or on an ``OSError`` (a full disk) none; with ``sync`` it has reached the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size, left = os.fstat(descriptor).st_size, memoryview(content)
        try:
            while left:
                left = left[os.write(descriptor, left):]
            if sync:
                os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            error.filename = path
            raise
    finally:
        os.close(descriptor)


class Appended:
    """A file that grows by pieces which are there whole, in order: those that cannot be written now are kept, and go with the next.

    Args:
        tell: takes a line about the file: once when it cannot be written, and again should pieces be lost.
    """

    _MOST = 64 << 20  # bytes kept

    def __init__(self, path: str, tell: Callable[[str], None], sync: bool = False):
        self.path, self.tell, self.sync = path, tell, sync
        self._waiting, self._failing = bytearray(), False

    def write(self, piece: bytes) -> None:
        if len(self._waiting) + len(piece) > self._MOST:
            self._waiting.clear()
            self.tell(f"{self.path}: cannot be written for too long; what it should have had meanwhile is lost")
        self._waiting += piece
        before, error = self._failing, self._flush()
        self._failing = error is not None
        if error is not None and not before:
            self.tell(f"{self.path}: cannot be written ({error.strerror}); what it lacks is kept for later")

    def _flush(self) -> OSError | None:
        try:
            append_whole(self.path, bytes(self._waiting), self.sync)
        except OSError as error:
            return error
        self._waiting.clear()
        return None

    def close(self) -> None:
        """Try once more where something is waiting."""
        if self._waiting and (error := self._flush()) is not None:
            self._waiting.clear()
            self.tell(f"{self.path}: cannot be written ({error.strerror}); what it lacks is lost")


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
