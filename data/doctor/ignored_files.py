"""Files that lie among the images and are passed over: counted by kind, so that a forgotten format is noticed."""

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

HIDDEN, LOOSE, BROKEN = "hidden files and folders", "images outside a class folder", "links to nothing, pipes and devices"
_KNOWN_JUNK = ("thumbs.db", "desktop.ini")
_LABELS = (".cls", ".json", ".tar")  # WebDataset's, and tar files in a tar file, are no strays


def strays(source: Source) -> tuple[Counter[str], dict[str, str]]:
    """(how many of each kind, an example of each) that lie where a source's images lie.

    Lists and tables name their images, so that nothing beside them counts.
    """
    found: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def note(kind: str, path: str) -> None:
        found[kind] += 1
        examples.setdefault(kind, path)

    if isinstance(source, ArchiveImages):
        for path in source.files:
            _in_archive(path, note)
    elif isinstance(source, ImageFolder):
        _in_folder(source.root, note, source.classes != [""])
    return found, examples


def _kind(name: str) -> str | None:
    if name.startswith(".") or name.lower() in _KNOWN_JUNK:
        return HIDDEN
    return None if is_image(name) else f"{os.path.splitext(name)[1].lower() or 'no extension'} files"


def _in_folder(root: str, note: Callable[[str, str], None], classes: bool) -> None:
    below: list[tuple[str, bool]] = [(root, True)]
    seen = set()
    while below:
        folder, top = below.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if is_hidden(entry.name):
                        note(HIDDEN, entry.path)
                    else:
                        below.append((entry.path, False))
                elif kind := _kind(entry.name):
                    note(kind, entry.path)
                elif not entry.is_file():
                    note(BROKEN, entry.path)
                elif top and classes:
                    note(LOOSE, entry.path)


def _in_archive(path: str, note: Callable[[str, str], None]) -> None:
    try:
        for name in _members(path):
            parts = name.removeprefix("./").split("/")
            if any(is_hidden(part) for part in parts):
                note(HIDDEN, f"{path}/{name}")
            elif (kind := _kind(parts[-1])) and not parts[-1].lower().endswith(_LABELS):
                note(kind, f"{path}/{name}")
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError):
        return  # what could be listed counts; that an archive is damaged is another's finding


def _members(path: str) -> Iterator[str]:
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as file:
            yield from (info.filename for info in file.infolist() if not info.is_dir())
        return
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # it would keep a kilobyte for each
            if not member.isdir():
                yield member.name
