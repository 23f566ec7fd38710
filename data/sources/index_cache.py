"""The list of a large data set's files, kept between runs: arrays in an npz file, never pickle.

An entry is found by what it lists and holds the time and size of every folder or archive that it was read from; reusing it
costs one ``stat`` of each. A folder's time changes when a file is added, removed or renamed in it. The doctor keeps an entry of
whatever size, with checksums that training does not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.sources.packed_names import PackedNames

_VERSION = 2
_NAME = "hierarchical-transformers"
WORTH_KEEPING = 10_000  # images; fewer are listed in no time
_TICK = 2.0  # seconds within which a file system may give two changes the same time

Index = dict[str, np.ndarray]
# What numpy raises for a file that is none of its archives, or a damaged one.
DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
SUMS = "sums."  # keys that begin so are for whoever checks the files


@dataclass
class Entry:
    """An index as ``cached`` gave it: the file it is kept in (None: nowhere), what it depends on, when it was begun (0: kept before)."""

    path: str | None
    index: Index
    watched: list[str]
    begun: float


_recorded: list[Entry] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Entry]]:
    """Inside, every index that is used is put on the list that is returned."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def keep(entry: Entry, sums: Index) -> bool:
    """Keep an entry with checksums (their keys without ``SUMS``) for the next run; False where that cannot be.

    It cannot be where the data changed in the moment before it was listed.
    """
    if entry.path is None:
        return False
    plain = {key: value for key, value in entry.index.items() if key != "stamps" and not key.startswith("watched.")}
    return _write(entry.path, plain | {SUMS + key: value for key, value in sums.items()}, entry.watched, entry.begun,
                  entry.index.get("stamps"))


def cache_folder(setting: str) -> str | None:
    """The folder that ``DATA.INDEX_CACHE`` means; None for none."""
    if setting.lower() in ("", "none"):
        return None
    if setting != "auto":
        return os.path.expanduser(setting)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, _NAME) if os.path.isabs(base) else None


def cached(folder: str | None, kind: str, places: Sequence[str], build: Callable[[], tuple[Index, list[str]]]) -> Index:
    """The index of ``places``: the kept one if nothing has changed since, else built anew and kept if it is large.

    Args:
        kind: what the index is of; indices of different kinds never mix.
        build: returns the index (with ``targets``, an image each) and the folders or archives that it depends on.
    """
    if folder is None:
        begun = time.time()
        index, watched = build()
        return _note(Entry(None, index, watched, begun))
    key = "\0".join([str(_VERSION), kind, *(os.path.abspath(place) for place in places)])
    path = os.path.join(folder, hashlib.sha256(os.fsencode(key)).hexdigest()[:32] + ".npz")
    index = _read(path)
    if index is not None:
        return _note(Entry(path, index, list(names_of(index, "watched")) if _recorded is not None else [], 0.0))
    begun = time.time()
    index, watched = build()
    if len(index["targets"]) >= WORTH_KEEPING:
        _write(path, index, watched, begun)
    return _note(Entry(path, index, watched, begun))


def _note(entry: Entry) -> Index:
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
    """(paths, 2): time in ns, and the size of a file."""
    found = [os.stat(path) for path in paths]
    return np.array([(s.st_mtime_ns, 0 if os.path.isdir(p) else s.st_size) for s, p in zip(found, paths, strict=True)],
                    dtype=np.int64).reshape(-1, 2)


def _read(path: str) -> Index | None:
    # A cache is never a reason to fail: whatever is wrong with it, the files are listed again.
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {key: file[key] for key in file.files if not key.startswith(SUMS)}
        watched = names_of(index, "watched")
        packed = [key[:-5] for key in index if key.endswith(".ends")]
        whole = all(int(index[k + ".ends"][-1]) == len(index[k + ".blob"]) for k in packed if len(index[k + ".ends"]))
        if whole and np.array_equal(_stamps([watched[i] for i in range(len(watched))]), index["stamps"]):
            return index
    except DAMAGED:
        pass
    return None


def _write(path: str, index: Index, watched: list[str], begun: float, known: np.ndarray | None = None) -> bool:
    """Whether the index was kept; ``known`` are the stamps that it was found with, which must still hold."""
    with contextlib.suppress(OSError):
        watched = [os.path.abspath(place) for place in watched]
        stamps = _stamps(watched)
        if known is not None and not np.array_equal(stamps, known):
            return False
        if known is None and len(stamps) and stamps[:, 0].max() > (begun - _TICK) * 1e9:
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
