"""A folder a class: finding the splits, the classes and the images, and decoding them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "validation")
LAYOUT = "expected train/<class>/*.jpg and val/<class>/*.jpg (or validation/)"


class DataError(RuntimeError):
    """The data cannot be used; one sentence with the path and the remedy (exit status 3)."""


@dataclass
class ImageFolder:
    """The images of one split, by class; a million paths cost two arrays, not a million Python objects.

    Attributes:
        classes: class names; ``targets`` are positions in it.
        notices: lines the user should see.
    """

    root: str
    classes: list[str]
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _blob: bytes = b""
    _ends: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    notices: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self._blob[start:int(self._ends[index])]))

    def read(self, index: int) -> bytes:
        """The file as it is.

        Raises:
            DataError: it cannot be read.
        """
        path = self.path(index)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: not a readable image ({error}); repair or remove it") from None

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises:
            DataError: it cannot be read; the message names the file.
        """
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                return to_rgb(Image.open(file))
        # Pillow's bomb error is no OSError; damaged PNG and TIFF raise SyntaxError and ValueError.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: not a readable image ({error}); repair or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; 16-bit grey is scaled to 8 bits, where Pillow alone would clip it to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about a table of transparencies otherwise
    return image.convert("RGB")


def find_split(root: str, names: Sequence[str]) -> str:
    """The folder of a split below ``root``.

    Raises:
        DataError: no such folder, with advice from what is there instead.
    """
    if not os.path.exists(root):
        raise DataError(f"{root}: no such data folder; give the folder that holds train/ and val/ with --data-path")
    if not os.path.isdir(root):
        raise DataError(f"{root}: is a file; give the folder that holds train/ and val/ with --data-path")
    for name in names:
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in names)} folder; {LAYOUT}{_advice(root)}")


def _advice(root: str) -> str:
    entries = _entries(root)
    folders = [e.name for e in entries if e.is_dir()]
    if not entries:
        return "; the folder is empty"
    splits = {"train", *VAL_NAMES}
    if os.path.basename(os.path.abspath(root)) in splits:
        return f"; this looks like one split, give its parent {os.path.dirname(os.path.abspath(root))}"
    for name in folders:
        if splits & {e.name for e in _entries(os.path.join(root, name)) if e.is_dir()}:
            return f"; {os.path.join(root, name)} holds them, give that"
    if folders and any(_is_image(e.name) for e in _entries(os.path.join(root, folders[0]))):
        return "; its folders look like classes without a split: move them into train/ and a part of each class into val/"
    return ""


def _entries(folder: str) -> list[os.DirEntry]:
    """Visible entries, sorted by name as torchvision sorts them."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _images_below(folder: str, above: tuple[str, ...] = ()) -> list[str]:
    real = os.path.realpath(folder)
    if real in above:
        return []  # a link back to a folder that holds it
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += _images_below(entry.path, (*above, real))
        elif _is_image(entry.name) and entry.is_file():  # no pipes, no links to nothing
            found.append(entry.path)
    return found


def scan_folder(root: str, classes: Sequence[str] | None = None) -> ImageFolder:
    """Index the images below ``root``, a folder a class (images may lie deeper).

    Args:
        classes: names that count, in order; None takes the folders' names, sorted. Folders are matched **by name**, so
            that a split lacking a class does not shift the labels of the others.

    Raises:
        DataError: no images, or a class that ``classes`` does not know.
    """
    folders = [e.name for e in _entries(root) if e.is_dir()]
    if not folders:
        loose = any(_is_image(e.name) for e in _entries(root))
        raise DataError(f"{root}: {'its images lie loose' if loose else 'holds no class folders'}; {LAYOUT}"
                        + ("; sort the images into a folder a class" if loose else ""))
    names = list(classes) if classes is not None else folders
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is unknown to the training classes"
                        f" ({len(unknown)} such: {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''});"
                        " rename or remove the folder, or train with it")
    found = ImageFolder(root, names)
    number = {name: i for i, name in enumerate(names)}
    paths, targets, empty = [], [], []
    for folder in folders:
        images = [os.path.relpath(path, root) for path in _images_below(os.path.join(root, folder))]
        paths += images
        targets += [number[folder]] * len(images)
        if not images:
            empty.append(folder)
    if not paths:
        raise DataError(f"{root}: holds class folders but no images ({', '.join(e[1:] for e in IMAGE_EXTENSIONS)}); {LAYOUT}")
    encoded = [os.fsencode(path) for path in paths]
    found._blob = b"".join(encoded)
    found._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    found.targets = np.asarray(targets, dtype=np.int64)
    absent = [name for name in names if name not in set(folders)]
    for what, which in (("empty class folders", empty), ("classes without a folder", absent)):
        if which:
            found.notices.append(f"warning: {root}: {len(which)} {what} ({', '.join(which[:5])}{', ...' if len(which) > 5 else ''})")
    return found
