"""A cache of the file lists ("indices") of large data sets between runs: arrays in an npz file, never pickle.

An entry is found by the paths that it lists, and holds the time and size of every folder or archive that it was read from, so
that checking it takes one ``stat`` of each. A folder's time changes when a file is added, removed or renamed in it. The doctor
writes an entry of any size, with checksums that training does not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from config import require_regular
from data.sources.packed_names import PackedNames

_VERSION = 3
_NAME = "hierarchical-transformers"
MIN_CACHED_IMAGES = 10_000  # fewer are listed in no time
_TIME_RESOLUTION = 2.0  # seconds within which a file system may give two changes the same time

Index = dict[str, np.ndarray]
# What numpy raises for a file that is not an npz file, or a damaged one.
NPZ_ERRORS = (OSError, ValueError, LookupError, ArithmeticError, EOFError, TypeError, RuntimeError, MemoryError, SyntaxError,
              tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error)
_CHECKSUM_PREFIX = "sums."  # of keys that hold the doctor's checksums


@dataclass
class Entry:
    """An index that ``cached`` returned, and what is needed to write it to the cache again.

    Attributes:
        path: its file in the cache; None without a cache.
        watched: the folders or archives that it depends on.
        started: when listing began, in seconds since the epoch; 0 where the index came from the cache.
    """

    path: str | None
    index: Index
    watched: list[str]
    started: float


_recorded: list[Entry] | None = None


@contextlib.contextmanager
def record_entries() -> Iterator[list[Entry]]:
    """Within it, every index that ``cached`` returns is appended to the list that it yields."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def write_with_checksums(entry: Entry, checksums: Index) -> bool:
    """Write an entry with checksums of its files to the cache; False where that is impossible: the data has just changed."""
    if entry.path is None:
        return False
    plain = {key: value for key, value in entry.index.items() if key != "stamps" and not key.startswith("watched.")}
    return _write(entry.path, plain | {_CHECKSUM_PREFIX + key: value for key, value in checksums.items()}, entry.watched, entry.started,
                  entry.index.get("stamps"))


def cache_folder(setting: str) -> str | None:
    """The cache's folder, from the setting DATA.INDEX_CACHE; None for no cache."""
    if setting.lower() in ("", "none"):
        return None
    if setting != "auto":
        return os.path.expanduser(setting)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, _NAME) if os.path.isabs(base) else None


def cached(folder: str | None, kind: str, places: Sequence[str], build: Callable[[], tuple[Index, list[str]]]) -> Index:
    """The index of ``places``: the cached one if nothing has changed since, else built, and cached if it is large.

    Args:
        folder: the cache's folder, or None.
        kind: of data; entries of different kinds never mix.
        places: paths of the folders or archives.
        build: returns the index (with ``targets``, one per image) and the folders or archives that it depends on.
    """
    path = None
    if folder is not None:
        key = "\0".join([str(_VERSION), kind, *(os.path.abspath(place) for place in places)])
        path = os.path.join(folder, hashlib.sha256(os.fsencode(key)).hexdigest()[:32] + ".npz")
        index = _read(path)
        if index is not None:
            return _recorded_index(Entry(path, index, list(names_of(index, "watched")) if _recorded is not None else [], 0.0))
    started = time.time()
    index, watched = build()
    if path is not None and len(index["targets"]) >= MIN_CACHED_IMAGES:
        _write(path, index, watched, started)
    return _recorded_index(Entry(path, index, watched, started))


def _recorded_index(entry: Entry) -> Index:
    if _recorded is not None:
        _recorded.append(entry)
    return entry.index


def names_of(index: Index, key: str) -> PackedNames:
    """The names stored under ``key``."""
    return PackedNames(index[key + ".blob"], index[key + ".ends"])


def store_names(index: Index, key: str, names: PackedNames) -> None:
    """Store names under ``key``."""
    index[key + ".blob"], index[key + ".ends"] = names.blob, names.ends


def _stamps(paths: Sequence[str]) -> np.ndarray:
    """(paths, 2) int64: modification time in ns, and size in bytes (0 for a folder)."""
    stats = [os.stat(path) for path in paths]
    return np.array([(s.st_mtime_ns, 0 if os.path.isdir(p) else s.st_size) for s, p in zip(stats, paths, strict=True)],
                    dtype=np.int64).reshape(-1, 2)


def _read(path: str) -> Index | None:
    # A cache is never a reason to fail: whatever is wrong with it, the files are listed again.
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            index = {key: file[key] for key in file.files if not key.startswith(_CHECKSUM_PREFIX)}
        watched = names_of(index, "watched")
        packed = [key[:-5] for key in index if key.endswith(".ends")]
        whole = all(int(index[k + ".ends"][-1]) == len(index[k + ".blob"]) for k in packed if len(index[k + ".ends"]))
        if whole and np.array_equal(_stamps([watched[i] for i in range(len(watched))]), index["stamps"]):
            return index
    except NPZ_ERRORS:
        pass
    return None


def _write(path: str, index: Index, watched: list[str], started: float, known: np.ndarray | None = None) -> bool:
    """Whether the index was written; ``known``, the stamps of an index that came from the cache, must still hold."""
    with contextlib.suppress(OSError):
        watched = [os.path.abspath(place) for place in watched]
        stamps = _stamps(watched)
        if known is not None and not np.array_equal(stamps, known):
            return False
        if known is None and len(stamps) and stamps[:, 0].max() > (started - _TIME_RESOLUTION) * 1e9:
            return False  # changed just now: a further change might leave the same time
        content = dict(index, stamps=stamps)
        store_names(content, "watched", PackedNames.of(watched))
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=".index-", dir=os.path.dirname(path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **content)
            os.replace(scratch, path)
            return True
        finally:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
    return False
