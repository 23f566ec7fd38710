"""Images that are files: class folders, flat folders, and files that a list names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.errors import DataError, UnreadableImage
from data.messages import Caution
from data.sources.base import Source
from data.sources.classes import first_few
from data.sources.index_cache import Index, cached, names_of, store_names
from data.sources.listing_progress import tick
from data.sources.packed_names import IMAGE_EXTENSIONS, PackedNames, is_hidden, is_image
from data.sources.regular_files import LARGEST_IMAGE, NotARegularFile, read_regular

VAL_NAMES = ("val", "validation")
_THREADS = 16
EXPECTED = "expected train/<class>/*.jpg and val/<class>/*.jpg (or validation/)"


class ImageFolder(Source):
    """Images that are files, named by their paths below ``root`` or by absolute paths."""

    parallel = True

    def __init__(self, root: str, classes: list[str], names: PackedNames, targets: np.ndarray, notices: Sequence[str] = ()):
        self.root, self.classes, self.names, self.targets, self.notices = root, classes, names, targets, list(notices)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def fetch(self, index: int) -> bytes:
        try:
            return read_regular(self.path(index), LARGEST_IMAGE)
        except NotARegularFile as error:
            raise UnreadableImage.of(self.path(index), error) from None

    def identity(self) -> bytes:
        return self.names.blob.tobytes() + self.names.ends.tobytes()


def visible_entries(folder: str, circle: Callable[[str], None] = lambda path: None) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, sorted by name as torchvision sorts them.

    Args:
        circle: called with the path of each symbolic link that leads back to itself, which is left out.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_hidden(e.name) and not _is_circle(e, circle)), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_circle(entry: os.DirEntry, circle: Callable[[str], None]) -> bool:
    if entry.is_symlink():
        try:
            entry.is_dir()
        except OSError as error:
            if error.errno == errno.ELOOP:
                circle(entry.path)
                return True
            raise
    return False


CIRCLE = "is a symbolic link that leads back to itself"


def _refuse(path: str) -> None:
    raise DataError(f"{path}: {CIRCLE}; remove it")


def _images_below(folder: str, above: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """(images, folders) below a folder, itself included; links back to a folder above are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return [], []
    images, folders = [], [folder]
    for entry in visible_entries(folder, _refuse):
        if entry.is_dir():
            for found, more in zip((images, folders), _images_below(entry.path, (*above, real)), strict=True):
                found += more
        elif is_image(entry.name) and entry.is_file():  # no pipes, no broken links
            images.append(entry.path)
    return images, folders


def images_below(folder: str) -> list[str]:
    """Paths of the visible images below a folder, at any depth.

    Raises:
        DataError: a folder cannot be read.
    """
    return _images_below(folder)[0]


def _index_folder(root: str) -> tuple[Index, list[str]]:
    inside = visible_entries(root, _refuse)
    classes = [e.name for e in inside if e.is_dir()]
    if not classes:
        loose = any(is_image(e.name) for e in inside)
        raise DataError(f"{root}: {'its images lie loose' if loose else 'holds no class folders'}; {EXPECTED}"
                        + ("; sort them into a folder per class, or give the file of their labels with DATA.VAL_LABELS" if loose else ""))
    # The threads wait for the disk or the network at the same time; the listing itself is quick.
    with ThreadPoolExecutor(min(_THREADS, len(classes))) as pool:
        found, images = [], 0
        for below in pool.map(_images_below, [os.path.join(root, name) for name in classes]):
            found.append(below)
            tick(root, images := images + len(below[0]))
    skip = len(os.path.join(root, ""))
    counts = [len(images) for images, _ in found]
    if not sum(counts):
        raise DataError(f"{root}: holds class folders but no images ({', '.join(e[1:] for e in IMAGE_EXTENSIONS)}); {EXPECTED}")
    index = dict(targets=np.repeat(np.arange(len(classes)), counts))
    store_names(index, "names", PackedNames.of([path[skip:] for images, _ in found for path in images]))
    store_names(index, "classes", PackedNames.of(classes))
    return index, [root, *(folder for _, folders in found for folder in folders)]


def scan_folder(root: str, cache: str | None = None) -> ImageFolder:
    """The images below ``root``, one folder per class (images may lie deeper).

    Args:
        cache: folder of the index cache (``data/sources/index_cache.py``), or None.

    Raises:
        DataError: no class folders, or no images.
    """
    index = cached(cache, "folder", [root], lambda: _index_folder(root))
    names, targets = list(names_of(index, "classes")), index["targets"]
    empty = [names[i] for i in np.flatnonzero(np.bincount(targets, minlength=len(names)) == 0)]
    notices = [Caution(f"{root}: {len(empty)} empty class folders ({first_few(empty)})", "empty-classes")] if empty else []
    return ImageFolder(root, names, names_of(index, "names"), targets, notices)


def scan_flat(root: str) -> ImageFolder:
    """The images directly in ``root``, by name, all of one class called ""; labels come from elsewhere."""
    names = [e.name for e in visible_entries(root, _refuse) if is_image(e.name) and e.is_file()]
    return ImageFolder(root, [""], PackedNames.of(names), np.zeros(len(names), dtype=np.int64))
