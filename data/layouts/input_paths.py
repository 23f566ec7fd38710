"""Images that a user names one by one, by folder, by pattern or in a list, without labels: what prediction reads."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from data.errors import DataError, UnreadableImage
from data.sources.folder import ImageFolder, entries
from data.sources.packed_names import IMAGE_EXTENSIONS, PackedNames, is_image

LIST_EXTENSION, STANDARD_INPUT = ".txt", "-"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SHOWN = 5

Item = tuple[str, str]  # a name, and why there is no image behind it ("": there may be one)


class GivenImages(ImageFolder):
    """Images in the order given; an image's target is its number.

    Attributes:
        faults: why there is no image behind a name, by its number; such an item cannot be read.
    """

    def __init__(self, names: Sequence[str], faults: dict[int, str]):
        super().__init__("", [], PackedNames.of(names), np.arange(len(names)))
        self.faults = faults

    def fetch(self, index: int) -> bytes:
        if index in self.faults:
            raise UnreadableImage.of(self.path(index), self.faults[index])
        return super().fetch(index)


def find_given(paths: Sequence[str], standard_input: BinaryIO | None = None) -> GivenImages:
    """The images behind ``paths``, in their order: files, folders with all that lies below, patterns (``x/*.png``), lists.

    A list is a file that ends in .txt, or standard input for ``-``: a path of a file or folder a line, empty lines and
    lines that begin with # passed over. Its paths are relative to its own folder, or, where the first of them is not there, to the
    current one. Folders and patterns give images by their extensions; a file that is named is taken for an image whatever its name.

    Raises:
        DataError: not one image was found; says what each of ``paths`` is instead.
    """
    names, faults = [], {}
    for path in paths:
        for name, fault in _behind(path, standard_input):
            if fault:
                faults[len(names)] = fault
            names.append(name)
    if len(faults) == len(names):
        told = [f"{name}: {faults[number]}" for number, name in enumerate(names[:_SHOWN])]
        raise DataError("; ".join(told) + (f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""))
    return GivenImages(names, faults)


def _behind(path: str, standard_input: BinaryIO | None) -> Iterator[Item]:
    if path == STANDARD_INPUT:
        yield from _listed("standard input", standard_input.read() if standard_input is not None else b"", [""])
    elif path.lower().endswith(LIST_EXTENSION) and os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            yield path, f"cannot be read ({error.strerror})"
            return
        yield from _listed(path, text, [os.path.dirname(path), ""])
    elif not os.path.lexists(path) and glob.has_magic(path):
        yield from _matching(path)
    else:
        yield from _named(path)


def _named(path: str) -> Iterator[Item]:
    """A file or a folder."""
    if _URL.match(path):
        yield path, "is a URL; download it first"
        return
    try:
        os.stat(path)
    except FileNotFoundError:
        yield path, "no such file"
    except (OSError, ValueError) as error:
        yield path, f"cannot be read ({getattr(error, 'strerror', None) or error})"
    else:
        if os.path.isdir(path):
            yield from _or(_below(path), path, f"holds no images ({', '.join(e[1:] for e in IMAGE_EXTENSIONS)})")
        else:
            yield path, "" if os.path.isfile(path) else "is neither a file nor a folder"


def _below(folder: str, above: tuple[str, ...] = ()) -> Iterator[Item]:
    """Images below a folder; folders that links lead back to are passed over."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        found = entries(folder)
    except DataError as error:
        yield folder, str(error).rpartition(": ")[2]
        return
    for entry in found:
        if entry.is_dir():
            yield from _below(entry.path, (*above, real))
        elif is_image(entry.name) and entry.is_file():
            yield entry.path, ""


def _matching(pattern: str) -> Iterator[Item]:
    deep = "**" in pattern  # names the files below its folders too

    def found() -> Iterator[Item]:
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(path) and not deep:
                yield from _below(path)
            elif is_image(os.path.basename(path)) and os.path.isfile(path):
                yield path, ""

    yield from _or(found(), pattern, "matches no images")


def _listed(name: str, text: bytes, roots: Sequence[str]) -> Iterator[Item]:
    if b"\0" in text:
        yield name, "is no text in UTF-8; save it as UTF-8, a path a line"
        return
    lines = [os.fsdecode(line) for line in text.removeprefix(b"\xef\xbb\xbf").splitlines()]
    paths = [line for line in lines if line.strip() and not line.startswith("#")]
    root = next((root for root in roots if paths and os.path.lexists(os.path.join(root, paths[0]))), roots[0])
    yield from _or((item for path in paths for item in _named(path if _URL.match(path) else os.path.join(root, path))), name,
                   "lists no images")


def _or(items: Iterator[Item], name: str, fault: str) -> Iterator[Item]:
    """``items``, or where there are none that ``fault`` of ``name``."""
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        yield name, fault
