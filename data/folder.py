"""A folder a class: finding the classes and the images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data.classes import join, some
from data.decode import to_rgb
from data.errors import DataError
from data.names import IMAGE_EXTENSIONS, PackedNames, is_hidden, is_image
from data.source import Source

VAL_NAMES = ("val", "validation")
LAYOUT = "expected train/<class>/*.jpg and val/<class>/*.jpg (or validation/)"


class ImageFolder(Source):
    """Images that are files: below a root, or wherever a list says."""

    def __init__(self, root: str, classes: list[str], names: PackedNames, targets: np.ndarray, notices: Sequence[str] = ()):
        self.root, self.classes, self.names, self.targets, self.notices = root, classes, names, targets, list(notices)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def fetch(self, index: int) -> bytes:
        with open(self.path(index), "rb") as file:
            return file.read()


def entries(folder: str) -> list[os.DirEntry]:
    """Visible entries, sorted by name as torchvision sorts them."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not is_hidden(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _images_below(folder: str, above: tuple[str, ...] = ()) -> list[str]:
    real = os.path.realpath(folder)
    if real in above:
        return []  # a link back to a folder that holds it
    found = []
    for entry in entries(folder):
        if entry.is_dir():
            found += _images_below(entry.path, (*above, real))
        elif is_image(entry.name) and entry.is_file():  # no pipes, no links to nothing
            found.append(entry.path)
    return found


def scan_folder(root: str, classes: Sequence[str] | None = None) -> Source:
    """Index the images below ``root``, a folder a class (images may lie deeper).

    Args:
        classes: names that count, in order; None takes the folders' names, sorted. Folders are matched **by name**, so
            that a split lacking a class does not shift the labels of the others.

    Raises:
        DataError: no images, or a class that ``classes`` does not know.
    """
    folders = [e.name for e in entries(root) if e.is_dir()]
    if not folders:
        loose = any(is_image(e.name) for e in entries(root))
        raise DataError(f"{root}: {'its images lie loose' if loose else 'holds no class folders'}; {LAYOUT}"
                        + ("; sort the images into a folder a class" if loose else ""))
    paths, targets, empty = [], [], []
    for number, folder in enumerate(folders):
        images = [os.path.relpath(path, root) for path in _images_below(os.path.join(root, folder))]
        paths += images
        targets += [number] * len(images)
        if not images:
            empty.append(folder)
    if not paths:
        raise DataError(f"{root}: holds class folders but no images ({', '.join(e[1:] for e in IMAGE_EXTENSIONS)}); {LAYOUT}")
    notices = [f"warning: {root}: {len(empty)} empty class folders ({some(empty)})"] if empty else []
    found = ImageFolder(root, folders, PackedNames.of(paths), np.asarray(targets, dtype=np.int64), notices)
    return join(found, classes)


__all__ = ["DataError", "ImageFolder", "entries", "scan_folder", "to_rgb"]
