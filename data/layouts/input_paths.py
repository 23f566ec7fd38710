"""The images that prediction reads, without labels: named one by one, by folder, by pattern or in a list."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from data.errors import DataError, UnreadableImage
from data.sources.folder import CIRCLE, ImageFolder, visible_entries
from data.sources.packed_names import IMAGE_EXTENSIONS, PackedNames, is_image

LIST_EXTENSION, STANDARD_INPUT = ".txt", "-"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SHOWN = 5

Item = tuple[str, str]  # a name, and why it is not an image ("": it may be one)


class InputImages(ImageFolder):
    """Images in the order given; an image's target is its index.

    Attributes:
        errors: why a name is not an image, by its index; reading it raises an error.
    """

    def __init__(self, names: Sequence[str], errors: dict[int, str]):
        super().__init__("", [], PackedNames.of(names), np.arange(len(names)))
        self.errors = errors

    def fetch(self, index: int) -> bytes:
        if index in self.errors:
            raise UnreadableImage.of(self.path(index), self.errors[index])
        return super().fetch(index)


def find_input_images(paths: Sequence[str], standard_input: BinaryIO | None = None) -> InputImages:
    """The images that ``paths`` name, in their order: files, folders with everything below, patterns (``x/*.png``), lists.

    A list is a file that ends in .txt, or standard input for ``-``: the path of a file or folder per line; empty lines and
    lines that begin with # are ignored. Its paths are relative to its own folder, or, where the first of them is not there, to the
    working directory. In folders and patterns images are found by their extensions; a file that is named is read whatever its name.

    Raises:
        DataError: no image was found; the message says what each of ``paths`` is instead.
    """
    names, errors = [], {}
    for path in paths:
        for name, error in _find(path, standard_input):
            if error:
                errors[len(names)] = error
            names.append(name)
    if len(errors) == len(names):
        shown = [f"{name}: {errors[index]}" for index, name in enumerate(names[:_SHOWN])]
        raise DataError("; ".join(shown) + (f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""))
    return InputImages(names, errors)


def _find(path: str, standard_input: BinaryIO | None) -> Iterator[Item]:
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
        yield from _file_or_folder(path)


def _file_or_folder(path: str) -> Iterator[Item]:
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
            yield from _or_error(_below(path), path, f"holds no images ({', '.join(e[1:] for e in IMAGE_EXTENSIONS)})")
        else:
            yield path, "" if os.path.isfile(path) else "is neither a file nor a folder"


def _below(folder: str, above: tuple[str, ...] = ()) -> Iterator[Item]:
    """Images below a folder; links back to a folder above are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    circles: list[str] = []
    try:
        entries = visible_entries(folder, circles.append)
    except DataError as error:
        yield folder, str(error).rpartition(": ")[2]
        return
    yield from ((path, CIRCLE) for path in circles)
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry.path, (*above, real))
        elif is_image(entry.name) and entry.is_file():
            yield entry.path, ""


def _matching(pattern: str) -> Iterator[Item]:
    deep = "**" in pattern  # matches the files in its folders as well

    def found() -> Iterator[Item]:
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(path) and not deep:
                yield from _below(path)
            elif is_image(os.path.basename(path)) and os.path.isfile(path):
                yield path, ""

    yield from _or_error(found(), pattern, "matches no images")


def _listed(name: str, text: bytes, roots: Sequence[str]) -> Iterator[Item]:
    if b"\0" in text:
        yield name, "is not UTF-8 text; save it as UTF-8, with one path per line"
        return
    lines = [os.fsdecode(line) for line in text.removeprefix(b"\xef\xbb\xbf").splitlines()]
    paths = [line for line in lines if line.strip() and not line.startswith("#")]
    root = next((root for root in roots if paths and os.path.lexists(os.path.join(root, paths[0]))), roots[0])
    yield from _or_error((item for path in paths for item in _file_or_folder(path if _URL.match(path) else os.path.join(root, path))),
                         name, "lists no images")


def _or_error(items: Iterator[Item], name: str, error: str) -> Iterator[Item]:
    """``items``; where there are none, ``name`` with ``error``."""
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        yield name, error
