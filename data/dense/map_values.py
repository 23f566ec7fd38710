"""From the file of a mask to one number a pixel, and from files beside the masks to what the numbers or colours stand for."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from config import yaml_tree
from data.decoding.pillow import FORMATS
from data.dense.base import IGNORED
from data.errors import DataError, UnreadableImage
from data.sources.folder import visible_entries
from data.sources.lists import lines_of, read_text

IGNORE_NAMES = ("ignore", "ignored")  # of a colour that is no class
MOST_CLASSES = 254  # in eight bits, beside 255, which is ignored, and 0, which may be
NAME_FILES = ("class_dict.csv", "labelmap.txt", "_classes.csv", "objectInfo150.txt", "classes.txt", "labels.txt", "class_names.txt",
              "codes.txt", "data.yaml", "data.yml", "dataset.yaml")
REMEDY = "masks hold a class a pixel: 8 bits, or colours that class_dict.csv (name,r,g,b) or labelmap.txt (name:r,g,b) beside them names"
_COLOUR_NAME = re.compile(r"(.+?)\s*:\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*(?::.*)?")


@dataclass
class Legend:
    """What the pixels of masks stand for.

    Attributes:
        names: of the classes.
        values: the pixel value of each; of colours its place in the file that names them.
        colours: (classes,) int64, red first, 65536 red + 256 green + blue; None where pixels are numbers.
        path: the file that says so, "" for none.
        things: of each class, whether it is of countable things.
        ignored: values that stand for no class, as 255 does.
    """

    names: list[str]
    values: list[int]
    colours: np.ndarray | None = None
    path: str = ""
    things: list[bool] | None = None
    ignored: frozenset[int] = frozenset()

    def table(self) -> np.ndarray:
        """(256,) uint8: the class of each pixel value, ``IGNORED`` for values that stand for none."""
        table = np.full(256, IGNORED, dtype=np.uint8)
        table[self.values] = np.arange(len(self.values))
        return table


def read_values(data: bytes, name: str, colours: np.ndarray | None = None) -> np.ndarray:
    """The values of a mask's pixels, (H, W) uint8, before they are classes.

    Grey that is stored as red, green and blue alike counts as grey, and 16 bits as 8 where no value is above 255.

    Args:
        name: of the file, for messages.
        colours: as ``Legend.colours``; pixels of these colours get their places in it.

    Raises:
        UnreadableImage: not an image, or damaged.
        DataError: values above 255, numbers that are not whole, or colours that nothing names.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's decoders raise anything
        raise UnreadableImage.of(name, error) from None
    if image.format == "JPEG":
        raise DataError(f"{name}: is a JPEG, whose compression changes the values of a mask; save masks as PNG")
    if colours is not None and image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"):
        return _places(np.asarray(image.convert("RGB")), colours, name)
    if image.mode in ("RGB", "RGBA", "LA", "PA"):
        pixels = np.asarray(image)
        if image.mode[:1] not in "LP" and not (pixels[..., :1] == pixels[..., :3]).all():
            raise DataError(f"{name}: has colours, and nothing says what they stand for; {REMEDY}")
        return np.ascontiguousarray(pixels[..., 0])
    pixels = np.asarray(image)
    if image.mode in ("1", "L", "P"):
        return pixels.astype(np.uint8)
    if pixels.dtype.kind not in "iu" or pixels.ndim != 2:
        raise DataError(f"{name}: has pixels of mode {image.mode}; {REMEDY}")
    if pixels.size and (pixels.max() > 255 or pixels.min() < 0):
        raise DataError(f"{name}: has the value {int(pixels.max())}; at most {MOST_CLASSES} classes are possible, numbered below 255")
    return pixels.astype(np.uint8)


def _places(pixels: np.ndarray, colours: np.ndarray, name: str) -> np.ndarray:
    """(H, W) uint8: the place of each pixel's colour in ``colours``."""
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    order = np.argsort(colours, kind="stable")
    at = np.searchsorted(colours[order], codes).clip(max=len(colours) - 1)
    found = order[at]
    if (odd := colours[found] != codes).any():
        code = int(codes[odd][0])
        raise DataError(f"{name}: has the colour {code >> 16},{code >> 8 & 255},{code & 255}, which the list of colours beside it lacks; "
                        "add it there, or repaint the mask (as PNG, without smoothing)")
    return found.astype(np.uint8)


def find_legend(folders: Sequence[str]) -> Legend | None:
    """What the first of ``NAME_FILES`` in the first of ``folders`` that has one says; None where there is none.

    Raises:
        DataError: it cannot be read as what its name says; names the line.
    """
    for folder in dict.fromkeys(folders):
        there = {entry.name: entry.path for entry in visible_entries(folder)} if os.path.isdir(folder) else {}
        for name in NAME_FILES:
            if name in there and (legend := read_legend(there[name])) is not None:
                return legend
    return None


def read_legend(path: str) -> Legend | None:
    """The classes that a file names: a line each, ``name:r,g,b`` (CVAT), a table (name,r,g,b; Roboflow's value and name; ADE20K's
    objectInfo150.txt) or a YAML's ``names``; None for a YAML without names.

    Raises:
        DataError: the file is not so; names the line.
    """
    text, name = read_text(path), os.path.basename(path)
    if name.endswith((".yaml", ".yml")):
        legend = _of_yaml(path, text)
    elif name.startswith("objectInfo"):
        legend = _of_ade(path, text)
    elif name == "_classes.csv" or name.endswith(".csv"):
        legend = _of_table(path, text)
    else:
        legend = _of_lines(path, text)
    if legend is not None:
        _check(legend)
    return legend


def _check(legend: Legend) -> None:
    path, twice = legend.path, [name for name in legend.names if legend.names.count(name) > 1]
    if not legend.names:
        raise DataError(f"{path}: names no class; write one a line, in the order of the values in the masks")
    if len(legend.names) > MOST_CLASSES:
        raise DataError(f"{path}: names {len(legend.names)} classes; maps of classes can have {MOST_CLASSES}")
    if twice:
        raise DataError(f"{path}: names the class {twice[0]!r} twice; name each class once")
    if len(set(legend.values)) < len(legend.values) or any(not 0 <= value < IGNORED for value in legend.values):
        raise DataError(f"{path}: gives classes the values {legend.values[:10]}; each needs its own, from 0 to 254")


def _of_lines(path: str, text: str) -> Legend:
    lines = [(number, line) for number, line in lines_of(text) if not line.startswith("#")]
    colours = [_COLOUR_NAME.fullmatch(line) for _, line in lines]
    if lines and all(colours):
        return _coloured(path, [(number, [found[1], *found.groups()[1:]]) for (number, _), found in zip(lines, colours, strict=True)])
    names = [line.split("\t")[-1].strip() for _, line in lines]
    if names and names[0].strip("_").lower() in IGNORE_NAMES:  # labelme's, for the value 255
        names = names[1:]
    return Legend(names, list(range(len(names))), path=path)


def _of_table(path: str, text: str) -> Legend:
    try:
        rows = [(number, [cell.strip() for cell in cells]) for number, cells in enumerate(csv.reader(io.StringIO(text)), 1) if any(cells)]
    except csv.Error as error:
        raise DataError(f"{path}: is not a table ({error})") from None
    rows = rows[1:]  # the header
    if all(len(cells) == 2 and cells[0].isdecimal() and len(cells[0]) < 10 for _, cells in rows):
        return Legend([cells[1] for _, cells in rows], [int(cells[0]) for _, cells in rows], path=path)
    return _coloured(path, rows)


def _coloured(path: str, rows: Sequence[tuple[int, Sequence[str]]]) -> Legend:
    names, codes = [], []
    for number, cells in rows:
        colour = cells[1:4]
        if len(colour) < 3 or not all(part.isdecimal() and len(part) < 4 and int(part) < 256 for part in colour):
            raise DataError(f"{path}:{number}: is not a class and its colour (name,r,g,b, each of them 0 to 255)")
        names.append(cells[0])
        codes.append(int(colour[0]) << 16 | int(colour[1]) << 8 | int(colour[2]))
    if len(set(codes)) < len(codes):
        raise DataError(f"{path}: gives two classes the same colour; give each its own")
    classes = [place for place, name in enumerate(names) if name.strip("_").lower() not in IGNORE_NAMES]
    return Legend([names[place] for place in classes], classes, np.array(codes, dtype=np.int64), path,
                  ignored=frozenset(range(len(names))) - set(classes))


def _of_ade(path: str, text: str) -> Legend:
    """ADE20K's table: index from 1, ratio, images of training and validation, whether stuff, names separated by commas or semicolons."""
    rows = [line.split("\t") for _, line in lines_of(text)][1:]
    if not rows or any(len(row) < 6 or not row[0].isdecimal() for row in rows):
        raise DataError(f"{path}: is not ADE20K's table (Idx, Ratio, Train, Val, Stuff, Name); take the original one, or rename it")
    names = [re.split("[,;]", row[5])[0].strip() for row in rows]
    names = [name if names.count(name) == 1 else row[5].strip() for name, row in zip(names, rows, strict=True)]
    return Legend(names, list(range(len(rows))), path=path, things=[row[4].strip() == "0" for row in rows])


def _of_yaml(path: str, text: str) -> Legend | None:
    try:
        tree = yaml_tree(text)
    except ValueError as error:
        raise DataError(f"{path}: is not YAML ({error.args[0]})") from None
    names = tree.get("names") if isinstance(tree, dict) else None
    if names is None:
        return None
    pairs = list(enumerate(names)) if isinstance(names, list) else list(names.items()) if isinstance(names, dict) else []
    if not pairs or not all(type(value) is int and isinstance(name, (str, int, float)) for value, name in pairs):
        raise DataError(f"{path}: its names are not a list of classes, nor a number and a name a line")
    return Legend([str(name) for _, name in pairs], [value for value, _ in pairs], path=path)
