"""Where the images of annotations lie, which of them are there, and how large they are."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from data.decoding.pillow import FORMATS
from data.errors import DataError
from data.sources.regular_files import kind_of
from data.sources.threads import Hang, in_threads

_TRIED = 20  # names by which the folder of the images is found
_LONGEST = 4096
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


def usable_name(name: object) -> str:
    """A file name as JSON or a list has it, of an address its last part; "" for what no file can be called."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > _LONGEST:
        return ""
    if "://" in name:
        try:
            name = unquote(urlsplit(name).path).rsplit("/", 1)[-1]
        except ValueError:
            return ""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return ""
    return name


def _as_written(name: str) -> str:
    return name


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def _last_part(name: str) -> str:
    return _with_slashes(name).rsplit("/", 1)[-1]


def place_images(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Paths of images in whichever of ``folders`` has most of the first ones: as they are named, or by the last part of the name alone."""
    sample = [name for name in names if name][:_TRIED]
    best, most = (folders[0], _as_written), -1
    for folder in dict.fromkeys(folders):
        for spelled in (_as_written, _with_slashes, _last_part):
            found = sum(os.path.exists(os.path.join(folder, spelled(name))) for name in sample)
            if found > most:
                best, most = (folder, spelled), found
    folder, spelled = best
    return [os.path.normpath(os.path.join(folder, spelled(name))) if name else "" for name in names]


class Listing:
    """Which files are there, by one listing of each folder."""

    def __init__(self) -> None:
        self.folders: dict[str, set[str]] = {}
        self.alike: dict[str, dict[str, str]] = {}  # by composed names: macOS writes accents apart

    def find(self, path: str) -> str:
        """The path of a file as it is spelled on the disk; "" where it is missing."""
        folder, name = os.path.split(path)
        if folder not in self.folders:
            try:
                self.folders[folder] = set(os.listdir(folder or "."))
            except (OSError, ValueError):
                self.folders[folder] = set()
        there = self.folders[folder]
        if name in there:
            return path
        if name.isascii():
            return ""
        if folder not in self.alike:
            self.alike[folder] = {unicodedata.normalize("NFC", entry): entry for entry in there}
        entry = self.alike[folder].get(unicodedata.normalize("NFC", name))
        return os.path.join(folder, entry) if entry else ""


def header_size(path: str, exif: bool = False) -> tuple[int, int]:
    """(height, width) as an image's header has them; (0, 0) for a file that cannot be read.

    Args:
        exif: of the image turned as its EXIF block says.
    """
    try:
        if kind_of(os.stat(path).st_mode):
            return 0, 0
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = exif and image.getexif().get(_ORIENTATION) in _TURNED
            return (width, height) if turned else (height, width)
    except Exception:  # Pillow raises all kinds on damaged bytes; whoever reads the image says what is wrong
        return 0, 0


def header_sizes(paths: Callable[[int], str], wanted: Sequence[int], exif: bool, timeout: float) -> np.ndarray:
    """(wanted, 2) int32: ``header_size`` of images, several at a time.

    Raises:
        DataError: none came for ``timeout`` seconds (0: wait for ever).
    """
    try:
        found = in_threads(lambda index: header_size(paths(index), exif), wanted, timeout)
    except Hang as hang:
        raise DataError(f"no image came for {timeout:g} seconds (DATA.TIMEOUT); being read at that moment: "
                        f"{', '.join(paths(index) for index in hang.busy)}; check the disk or network share that holds it") from None
    return np.array(found, dtype=np.int32).reshape(-1, 2)
