"""Files among the images that training ignores, counted by kind, so that a forgotten format is noticed."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator

from data.sources.archives import ArchiveImages
from data.sources.base import Source
from data.sources.folder import ImageFolder
from data.sources.packed_names import is_hidden, is_image

HIDDEN, LOOSE, BROKEN = "hidden files and folders", "images outside a class folder", "broken links, pipes and devices"
_KNOWN_JUNK = ("thumbs.db", "desktop.ini")
_USED_IN_ARCHIVES = (".cls", ".json", ".tar")  # WebDataset's labels, and tar files in a tar file


def ignored_files(source: Source) -> tuple[Counter[str], dict[str, str]]:
    """(number of each kind, an example of each) in the folder or the archives of a source; none for other sources."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def count(kind: str, path: str) -> None:
        counts[kind] += 1
        examples.setdefault(kind, path)

    if isinstance(source, ArchiveImages):
        for path in source.files:
            _count_in_archive(path, count)
    elif isinstance(source, ImageFolder):
        _count_in_folder(source.root, count, source.classes != [""])
    return counts, examples


def _kind(name: str) -> str | None:
    if name.startswith(".") or name.lower() in _KNOWN_JUNK:
        return HIDDEN
    return None if is_image(name) else f"{os.path.splitext(name)[1].lower() or 'no extension'} files"


def _count_in_folder(root: str, count: Callable[[str, str], None], has_class_folders: bool) -> None:
    folders: list[tuple[str, bool]] = [(root, True)]
    seen = set()
    while folders:
        folder, is_root = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    count(BROKEN, entry.path)
                elif entry.is_dir():
                    if is_hidden(entry.name):
                        count(HIDDEN, entry.path)
                    else:
                        folders.append((entry.path, False))
                elif kind := _kind(entry.name):
                    count(kind, entry.path)
                elif not entry.is_file():
                    count(BROKEN, entry.path)
                elif is_root and has_class_folders:
                    count(LOOSE, entry.path)


def _count_in_archive(path: str, count: Callable[[str, str], None]) -> None:
    try:
        for name in _members(path):
            parts = name.removeprefix("./").split("/")
            if any(is_hidden(part) for part in parts):
                count(HIDDEN, f"{path}/{name}")
            elif (kind := _kind(parts[-1])) and not parts[-1].lower().endswith(_USED_IN_ARCHIVES):
                count(kind, f"{path}/{name}")
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError):
        return  # a damaged archive is a finding of another check


def _members(path: str) -> Iterator[str]:
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as file:
            yield from (info.filename for info in file.infolist() if not info.is_dir())
        return
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # it would keep a kilobyte for each member
            if not member.isdir():
                yield member.name
